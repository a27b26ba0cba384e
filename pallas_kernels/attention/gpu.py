"""Ragged paged attention on NVIDIA GPUs: decode rows and prompt chunks of one step, in one buffer.

    rows    paged_decode    stores each row's new token, attends; merge_decode joins split rows;
                            on Hopper paged_decode_hopper does for more than 128 rows, where it
                            takes the step
    chunks  write_pages     stores the chunks' tokens
            paged_prefill   attends them over their pages, writes beside the rows' results; on
                            Hopper paged_prefill_hopper does, where it takes the step

Each kernel takes the pages from the one before it and hands them on, so that nothing is copied.

| compute capability | kernels | pages of 8 bits |
|---|---|---|
| below 8.0 | none: Triton has no products of theirs | |
| 8.0 to 8.8 | all three by Triton, blocks as their shared memory allows | int8 |
| 8.9 and later | the same | int8, float8_e4m3fn, float8_e5m2 |
| 9.0 | paged_prefill_hopper for 16-bit pages with D = 64 and 128 | by Triton |
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax

from octavo.pallas_kernels.attention.batch import RaggedBatch
from octavo.pallas_kernels.attention.gpu_decode import (
    DECODE,
    DecodeTuning,
    decode,
    decode_packed,
    why_not_decode,
)
from octavo.pallas_kernels.attention.gpu_hopper import (
    HOPPER,
    HopperTuning,
    prefill_hopper,
    why_not_hopper,
)
from octavo.pallas_kernels.attention.gpu_hopper_decode import (
    HOPPER_DECODE,
    HopperDecodeTuning,
    decode_hopper,
    why_not_hopper_decode,
)
from octavo.pallas_kernels.attention.gpu_prefill import prefill, prefill_tuning, why_not_prefill
from octavo.pallas_kernels.attention.gpu_write import write
from octavo.pallas_kernels.attention.reference import KV

Capability = tuple[int, int]
H100: Capability = (9, 0)
OLDEST: Capability = (8, 0)
FLOAT8: Capability = (8, 9)
KIB = 1024
# Shared memory of one program; those not named have the least.
SHARED = {(8, 0): 163 * KIB, (8, 7): 163 * KIB, (9, 0): 227 * KIB, (10, 0): 227 * KIB}
LEAST_SHARED = 99 * KIB


@dataclass(frozen=True)
class Tuning:
    """How the kernels are built; the defaults are what was measured to be the fastest."""

    decode: DecodeTuning = DECODE
    hopper: HopperTuning = HOPPER
    hopper_decode: HopperDecodeTuning = HOPPER_DECODE


TUNING = Tuning()
STATIC = ("window", "scale", "softcap", "capability", "tuning", "interpret")


def why_not(
    q: jax.Array, cache: KV, batch: RaggedBatch, capability: Capability = H100
) -> str | None:
    """The reason these kernels refuse a step, or None if they take it."""
    if capability < OLDEST:
        return "compute capability {}.{} is older than 8.0".format(*capability)
    if cache.k.dtype.name.startswith("float8") and capability < FLOAT8:
        return "compute capability {}.{} cannot read {} pages; 8.9 can".format(
            *capability, cache.k.dtype
        )
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
    capability: Capability = OLDEST,
    tuning: Tuning = TUNING,
    interpret: bool = False,
) -> tuple[jax.Array, KV]:
    """Write, then attend. q [N, H, D], k and v [N, K, D] -> [N, H, D] in the dtype of q.

    sinks f32[H] and kv_scales f32[2, K] as in reference.py; `capability` is the device's.
    """
    if refusal := why_not(q, cache, batch, capability):
        raise ValueError(f"attention on this GPU cannot take this step: {refusal}")
    rows = batch.table.shape[0] * batch.tokens_per_row
    chunks = q.shape[0] > rows
    form: dict[str, Any] = dict(window=window, scale=scale, softcap=softcap)
    static = form | dict(sinks=sinks)
    scaled: dict[str, Any] = dict(kv_scales=kv_scales, interpret=interpret)
    if _by_hopper(q, cache, batch, (sinks, kv_scales), capability, tuning):
        form |= dict(merged=tuning.decode.merged, tuning=tuning.hopper_decode)
        y, cache = decode_hopper(q, k, v, cache, batch, **form)
    else:
        y, cache = decode(q, k, v, cache, batch, **static, **scaled, tuning=tuning.decode)
    if not chunks:
        return y, cache
    cache = write(cache, k, v, batch.dest, kv_scales, base=rows, interpret=interpret)
    hopper = capability == H100 and q.shape[0] - rows >= tuning.hopper.least and kv_scales is None
    if hopper and why_not_hopper(q, cache.k) is None:
        return prefill_hopper(q, y, cache, batch, **static, tuning=tuning.hopper), cache
    most = SHARED.get(capability, LEAST_SHARED)
    blocks = prefill_tuning(q.shape[2], q.dtype.itemsize, cache.k.dtype.itemsize, most)
    return prefill(q, y, cache, batch, **static, **scaled, tuning=blocks), cache


def _by_hopper(
    q: jax.Array,
    cache: KV,
    batch: RaggedBatch,
    given: tuple[jax.Array | None, jax.Array | None],
    capability: Capability,
    tuning: Tuning,
) -> bool:
    """Whether Mosaic's kernel takes the decode rows."""
    if capability != H100 or batch.table.shape[0] < tuning.hopper_decode.least_rows:
        return False
    return why_not_hopper_decode(q, cache.k, batch, given) is None


def why_not_packed(
    mixed: jax.Array, cache: KV, batch: RaggedBatch, capability: Capability = H100
) -> str | None:
    """The reason `attend_packed` refuses a step, or None if it takes it."""
    N, K, J, D = mixed.shape
    if N != batch.table.shape[0] * batch.tokens_per_row:
        return "prompt chunks need their queries and keys outside of the kernel"
    q: Any = jax.ShapeDtypeStruct((N, K * (J - 2), D), mixed.dtype)
    return why_not(q, cache, batch, capability)


@functools.partial(
    jax.jit, static_argnames=("window", "scale", "softcap", "eps", "offset", "tuning", "interpret")
)
def attend_packed(
    mixed: jax.Array,
    turn: tuple[jax.Array, jax.Array],
    norms: jax.Array | None,
    cache: KV,
    batch: RaggedBatch,
    *,
    window: int,
    scale: float,
    softcap: float,
    eps: float,
    offset: float,
    sinks: jax.Array | None = None,
    kv_scales: jax.Array | None = None,
    tuning: Tuning = TUNING,
    interpret: bool = False,
) -> tuple[jax.Array, KV]:
    """`attend` for decode rows alone, from projections as they come: see `decode_packed`."""
    static: dict[str, Any] = dict(window=window, scale=scale, softcap=softcap, eps=eps)
    static |= dict(offset=offset, sinks=sinks, kv_scales=kv_scales, tuning=tuning.decode)
    return decode_packed(mixed, turn, norms, cache, batch, **static, interpret=interpret)
