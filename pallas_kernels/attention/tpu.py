"""Ragged paged attention on TPUs: decode rows and prompt chunks of one step.

    rows    tpu_decode     stores each row's new token and attends, in one walk
    chunks  tpu_write      stores the chunks' tokens, page by page
            tpu_prefill    attends them over their pages

The pages go from kernel to kernel in place.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from octavo.pallas_kernels.attention.batch import RaggedBatch
from octavo.pallas_kernels.attention.reference import stored
from octavo.pallas_kernels.attention.tpu_decode import decode
from octavo.pallas_kernels.attention.tpu_layout import SUBLANES, Layout, TpuKV, init_kv
from octavo.pallas_kernels.attention.tpu_prefill import prefill
from octavo.pallas_kernels.attention.tpu_write import write

__all__ = ["TpuKV", "attend", "init_kv", "page_bytes", "smallest_page", "why_not"]

STATIC = ("window", "scale", "softcap", "cores", "native", "chunk", "interpret")


def smallest_page(dtype: jax.typing.DTypeLike) -> int:
    """Tokens of the smallest page: one whole tile of registers."""
    return SUBLANES * 4 // jnp.dtype(dtype).itemsize


def chip(kind: str) -> dict[str, Any]:
    """What `attend` must know of a chip; `kind` is jax's device_kind, or a name as in v5p."""
    name = kind.lower().replace("tpu", "").strip()
    if name in ("v4", "v5p", "v5"):  # v5e is "v5 lite"
        return {"cores": 2}
    if "7" in name:  # it multiplies no integers
        return {"native": ("float8_e4m3fn",)}
    return {}


def page_bytes(
    layers: int, page_size: int, kv_heads: int, head_size: int, dtype: jax.typing.DTypeLike
) -> int:
    """Bytes of one page in all of `layers` layers, with the lanes that pad a head."""
    layout = Layout(kv_heads, 1, head_size)
    return layers * layout.tiles * page_size * layout.width * jnp.dtype(dtype).itemsize


def why_not(
    q: jax.Array,
    cache: TpuKV,
    batch: RaggedBatch,
) -> str | None:
    """The reason these kernels refuse a step, or None if they take it."""
    S, dtype = batch.page_size, cache.pages.dtype
    if batch.tokens_per_row != 1:
        return f"rows bring one token each, got {batch.tokens_per_row}"
    if q.shape[2] > 256:
        return f"heads have at most 256 lanes, got {q.shape[2]}"
    if S & (S - 1) or S < smallest_page(dtype):
        return (
            f"a page of {dtype} holds a power of two of at least {smallest_page(dtype)} "
            f"tokens, got {S}"
        )
    return None


@functools.partial(jax.jit, static_argnames=STATIC)  # layers alike are traced and lowered once
def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cache: TpuKV,
    batch: RaggedBatch,
    *,
    window: int,
    scale: float,
    softcap: float,
    sinks: jax.Array | None = None,
    kv_scales: jax.Array | None = None,
    cores: int = 1,
    native: tuple[str, ...] = ("int8", "float8_e4m3fn"),
    chunk: int = 0,
    interpret: Any = False,
) -> tuple[jax.Array, TpuKV]:
    """Write, then attend. q [N, H, D], k and v [N, K, D] -> [N, H, D] in the dtype of q.

    Raises ValueError for a step that `why_not` refuses. `cores` of one chip share the work
    (v4, v5p), pages of a kind in `native` are multiplied as they are: see `chip`. `chunk`
    replaces the tokens that decode attends to at once (tests).
    """
    if refusal := why_not(q, cache, batch):
        raise ValueError(f"attention on a TPU cannot take this step: {refusal}")
    R, H, K = batch.table.shape[0], q.shape[1], k.shape[1]
    small, factor = cache.pages.dtype, None
    if kv_scales is None:
        k, v = stored(k, None, small), stored(v, None, small)
    else:  # a key's scale is as good on the queries, a value's on the results
        k, v = stored(k, kv_scales[0], small), stored(v, kv_scales[1], small)
        factor, after = jnp.repeat(kv_scales, H // K, axis=1)
    layout = Layout(K, H // K, q.shape[2])
    static: dict[str, Any] = dict(window=window, scale=scale, softcap=softcap)
    static |= dict(layout=layout, interpret=interpret, sinks=sinks, factor=factor, cores=cores)
    alone = cache.layer is None
    pages = cache.pages[None] if alone else cache.pages
    layer = jnp.int32(0) if cache.layer is None else cache.layer
    y, pages = decode(
        q[:R],
        k[:R],
        v[:R],
        pages,
        layer,
        batch.table,
        batch.row_start + batch.row_count,
        batch.row_count > 0,
        batch.dest[:R],
        chunk=chunk,
        widen=small.itemsize == 1 and small.name not in native,
        **static,
    )
    if q.shape[0] > R:
        pages = write(k[R:], v[R:], pages, layer, batch, layout=layout, interpret=interpret)
        y = jnp.concatenate([y, prefill(q[R:], pages, layer, batch, **static)])
    if kv_scales is not None:
        y = (y * after[:, None]).astype(q.dtype)
    return y, TpuKV(pages[0]) if alone else TpuKV(pages, layer)
