"""Ragged paged attention on NVIDIA GPUs: decode rows and prompt chunks of one step, in one buffer.

    rows    paged_decode    stores each row's new token, attends; merge_decode joins split rows
    chunks  write_pages     stores the chunks' tokens
            paged_prefill   attends them over their pages, writes beside the rows' results; on
                            Hopper paged_prefill_hopper does, where it takes the step

Each kernel takes the pages from the one before it and hands them on, so that nothing is copied.
"""

import functools
from typing import Any

import jax

from octavo.pallas_kernels.attention.batch import RaggedBatch
from octavo.pallas_kernels.attention.gpu_decode import decode, why_not_decode
from octavo.pallas_kernels.attention.gpu_hopper import prefill_hopper, why_not_hopper
from octavo.pallas_kernels.attention.gpu_prefill import prefill, why_not_prefill
from octavo.pallas_kernels.attention.gpu_write import write
from octavo.pallas_kernels.attention.reference import KV

STATIC = ("window", "scale", "softcap", "hopper", "interpret")


def why_not(
    q: jax.Array,
    cache: KV,
    batch: RaggedBatch,
    sinks: jax.Array | None = None,
    kv_scales: jax.Array | None = None,
) -> str | None:
    """The reason these kernels refuse a step, or None if they take it."""
    for name, given in (("sinks", sinks), ("scales of keys and values", kv_scales)):
        if given is not None:
            return f"these kernels know no {name}"
    return why_not_decode(q, cache.k, batch) or why_not_prefill(q, cache.k)


@functools.partial(jax.jit, static_argnames=STATIC)  # layers alike are traced and lowered once
def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cache: KV,
    batch: RaggedBatch,
    *,
    window: int,
    scale: float,
    softcap: float,
    sinks: jax.Array | None = None,
    kv_scales: jax.Array | None = None,
    hopper: bool = False,
    interpret: bool = False,
) -> tuple[jax.Array, KV]:
    """Write, then attend. q [N, H, D], k and v [N, K, D] -> [N, H, D] in the dtype of q.

    `hopper`: the device is of that generation (compute capability 9.0).
    """
    if refusal := why_not(q, cache, batch, sinks, kv_scales):
        raise ValueError(f"attention on this GPU cannot take this step: {refusal}")
    static: dict[str, Any] = dict(window=window, scale=scale, softcap=softcap)
    y, cache = decode(q, k, v, cache, batch, **static, interpret=interpret)
    rows = batch.table.shape[0] * batch.tokens_per_row
    if q.shape[0] > rows:
        cache = write(cache, k, v, batch.dest, base=rows, interpret=interpret)
        if hopper and why_not_hopper(q, cache.k) is None:
            y = prefill_hopper(q, y, cache, batch, **static)
        else:
            y = prefill(q, y, cache, batch, **static, interpret=interpret)
    return y, cache
