"""A step's operations in what neuronx-cc compiles: whole pages are gathered, then dense attention.

    cache, one layer   k and v, each [P * S, K * D]: row page * S + offset is one token
    write              one scatter of rows, at places that lie in a table row or in the trash page
    read               one gather of whole pages [P, S * K * D] by the table, cut to the program's
                       context; what lies past a token's position is masked

        table [R, C]   7 2 0    page 0 is the trash page: a row that holds less reads it, masked
                       4 0 0

A program either decodes R rows or runs T tokens of one prompt. Every index is in bounds by
construction: tables hold page ids only, and a token that is padding writes to the trash page.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from octavo.backends import plain
from octavo.backends.record import Layer
from octavo.pallas_kernels.attention.batch import RaggedBatch
from octavo.pallas_kernels.attention.reference import MASKED

linear = plain.linear
page_bytes = plain.page_bytes


@flax.struct.dataclass
class FlatKV:
    """One layer's pages, a token a row."""

    k: jax.Array  # [P * S, K * D]
    v: jax.Array  # [P * S, K * D]


def init_cache(
    layers: Sequence[Layer],
    pages: Sequence[int],
    page_size: int,
    kv_heads: int,
    head_size: int,
    dtype: jax.typing.DTypeLike,
) -> tuple[FlatKV, ...]:
    """One `FlatKV` per layer."""

    def one(layer: Layer) -> FlatKV:
        shape = (pages[layer.group] * page_size, kv_heads * head_size)
        return FlatKV(k=jnp.zeros(shape, dtype), v=jnp.zeros(shape, dtype))

    return tuple(one(layer) for layer in layers)


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cache: FlatKV,
    batch: RaggedBatch,
    *,
    window: int,
    scale: float,
    softcap: float,
    sinks: jax.Array | None = None,
) -> tuple[jax.Array, FlatKV]:
    """Write, then attend. q [N, H, D], k and v [N, K, D] -> [N, H, D] in the dtype of q.

    N is R decode rows, or T tokens of the first chunk. sinks f32[H] as in
    octavo.pallas_kernels.attention.reference; a cache of 8 bits is refused before (record.py).
    """
    N, H, D = q.shape
    K = k.shape[1]
    decodes = batch.row_start.shape[0] > 0
    cache = FlatKV(
        k=_write(cache.k, k, batch.dest),
        v=_write(cache.v, v, batch.dest),
    )
    if decodes:
        table, position = batch.table, batch.position[:, None]  # [R, C], [R, 1]
        queries = q.reshape(N, 1, K, H // K, D)
    else:
        table = _rows(batch.table, batch.chunk_slot[:1])  # [1, C]
        position = batch.position[None]  # [1, T]
        queries = q.reshape(1, N, K, H // K, D)
    keys, values = (_read(pool, table, batch.page_size, K, D) for pool in (cache.k, cache.v))
    y = _dense(queries, keys, values, position, window, scale, softcap, sinks)
    return y.reshape(N, H, D).astype(q.dtype), cache


def _write(pool: jax.Array, new: jax.Array, dest: jax.Array) -> jax.Array:
    """pool [P * S, K * D] with new [N, K, D] at the rows dest i32[N]."""
    rows = new.reshape(new.shape[0], -1).astype(pool.dtype)
    return pool.at[dest].set(rows, mode="promise_in_bounds", wrap_negative_indices=False)


def _rows(x: jax.Array, index: jax.Array) -> jax.Array:
    """x[index] of x [P, ...] at i32[n]."""
    return x.at[index].get(mode="promise_in_bounds", wrap_negative_indices=False)


def _read(pool: jax.Array, table: jax.Array, size: int, K: int, D: int) -> jax.Array:
    """The tokens of every table row: [A, C * S, K, D] of pool [P * S, K * D] and table i32[A, C].

    A page is one row of the gather, so each is one contiguous copy.
    """
    rows, pages = table.shape
    whole = pool.reshape(-1, size * pool.shape[1])
    return _rows(whole, table.reshape(-1)).reshape(rows, pages * size, K, D)


def _dense(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    position: jax.Array,
    window: int,
    scale: float,
    softcap: float,
    sinks: jax.Array | None,
) -> jax.Array:
    """q [A, Q, K, G, D], k and v [A, J, K, D], position i32[A, Q] -> f32[A, Q, K, G, D]."""
    wide = {"preferred_element_type": jnp.float32}
    logits = jnp.einsum("aqkgd,ajkd->akgqj", q, k.astype(q.dtype), **wide) * scale
    if softcap:
        logits = softcap * jnp.tanh(logits / softcap)
    j = jnp.arange(k.shape[1], dtype=jnp.int32)
    seen = j <= position[:, :, None]  # [A, Q, J]
    if window:
        seen &= j > position[:, :, None] - window
    logits = jnp.where(seen[:, None, None], logits, MASKED)
    top = jnp.max(logits, axis=-1, keepdims=True)
    if sinks is not None:
        sink = sinks.astype(jnp.float32).reshape(1, *q.shape[2:4], 1, 1)
        top = jnp.maximum(top, sink)
    weight = jnp.exp(logits - top)
    total = jnp.sum(weight, axis=-1, keepdims=True)
    if sinks is not None:
        total = total + jnp.exp(sink - top)
    share = weight / total
    return jnp.einsum("akgqj,ajkd->aqkgd", share.astype(v.dtype), v, **wide)


def grouped_linear(x: jax.Array, weight: jax.Array, sizes: jax.Array) -> jax.Array:
    """x [N, in] sorted by expert, weight [X, in, out], sizes i32[X] -> [N, out].

    Every expert meets every row, one expert after another; a row keeps what its own one gives.
    """
    row = jnp.arange(x.shape[0], dtype=jnp.int32)[:, None]
    y = jnp.zeros((x.shape[0], weight.shape[2]), x.dtype)
    begin = jnp.zeros((), jnp.int32)
    for expert in range(weight.shape[0]):
        end = begin + sizes[expert]
        y = jnp.where((row >= begin) & (row < end), x @ weight[expert], y)
        begin = end
    return y


def layers(
    block: Callable[[jax.Array, Any, Any, Any], tuple[jax.Array, Any]],
    x: jax.Array,
    params: Sequence[Any],
    cache: Sequence[Any],
    specs: Sequence[Any],
) -> tuple[jax.Array, tuple[Any, ...]]:
    """A loop, unrolled: neuronx-cc schedules a flat program best."""
    return plain.layers(block, x, params, cache, specs)
