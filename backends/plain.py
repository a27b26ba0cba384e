"""The operations in plain jnp: they run wherever XLA does, and are at their best on a CPU."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from octavo.backends.record import Layer
from octavo.models.ops import Stacks
from octavo.pallas_kernels.attention import KV, init_kv

ROWS_PER_TILE = 32


class Projection(Protocol):
    """y = x @ weight + bias (`models.ops.Linear` is one)."""

    @property
    def weight(self) -> jax.Array: ...  # [in, out...]

    @property
    def bias(self) -> jax.Array | None: ...  # [out...]


def linear(x: jax.Array, layer: Projection) -> jax.Array:
    """x [N, in] -> [N, out...] in the dtype of x."""
    y = product(x, layer.weight)
    return y if layer.bias is None else y + layer.bias


def product(x: jax.Array, weight: jax.Array, dtype: Any = None) -> jax.Array:
    """x [N, in], weight [in, out...] -> [N, out...]; weight [blocks, in, columns] -> [N, out].

    `dtype` of the result, that of x where there is none.
    """
    if weight.ndim < 3 or weight.shape[1] != x.shape[1]:
        rows = (((1,), (0,)), ((), ()))
        return jax.lax.dot_general(x, weight, rows, preferred_element_type=dtype)
    y = jax.lax.dot_general(x, weight, (((1,), (1,)), ((), ())), preferred_element_type=dtype)
    return jax.lax.optimization_barrier(y).reshape(x.shape[0], -1)  # or XLA reshapes the weight


def grouped_linear(
    x: jax.Array,
    weight: jax.Array,
    sizes: jax.Array,
    first: jax.Array | int = 0,
    *,
    product: Callable[[jax.Array, jax.Array], jax.Array] = product,
) -> jax.Array:
    """x [N, in] sorted by expert, weight [.., in, out], sizes i32[X] -> [N, out]. The X experts
    begin at weight[first].

    A loop over tiles of rows of one expert, so that experts without rows cost nothing. A tile that
    reaches past its expert's rows computes garbage, which the next tile overwrites. Rows past the
    sum of sizes give 0 or such garbage: finite.
    """
    N, X = x.shape[0], sizes.shape[0]
    tile = min(ROWS_PER_TILE, N)
    x = jnp.pad(x, ((0, tile), (0, 0)))
    upto = jnp.tril(jnp.ones((X, X), jnp.int32))
    tiles = (sizes + (tile - 1)) // tile
    end, begin = upto @ tiles, upto @ sizes - sizes

    def one(i: jax.Array, y: jax.Array) -> jax.Array:
        expert = jnp.sum(i >= end)
        at = begin[expert] + (i - (end[expert] - tiles[expert])) * tile
        rows = jax.lax.dynamic_slice_in_dim(x, at, tile)
        w = jax.lax.dynamic_index_in_dim(weight, first + expert, keepdims=False)
        return jax.lax.dynamic_update_slice_in_dim(y, product(rows, w), at, 0)

    width = math.prod(weight.shape[1:]) // x.shape[1]
    y = jnp.zeros((N + tile, width), x.dtype)
    return jax.lax.fori_loop(0, end[-1], one, y)[:N]


def layers(
    block: Callable[[jax.Array, Any, Any, Any], tuple[jax.Array, Any]],
    x: jax.Array,
    params: Sequence[Any] | Stacks,
    cache: Sequence[Any],
    specs: Sequence[Any],
) -> tuple[jax.Array, tuple[Any, ...]]:
    """A loop, unrolled in the program: a scan would copy each layer's weights before use.

    Layers of one kind are traced once: tracing thirty of them is most of a warm start. `Stacks` are
    those of a pipeline's stage, with one layer each.
    """
    block = jax.jit(block, static_argnums=3)
    params = params.each() if isinstance(params, Stacks) else params
    after = []
    for one, kept, spec in zip(params, cache, specs, strict=True):
        x, kept = block(x, one, kept, spec)
        after.append(kept)
    return x, tuple(after)


def init_cache(
    layers: Sequence[Layer],
    pages: Sequence[int],
    page_size: int,
    kv_heads: int,
    head_size: int,
    dtype: jax.typing.DTypeLike,
) -> tuple[KV, ...]:
    """One `KV` per layer."""
    return tuple(
        init_kv(pages[layer.group], page_size, kv_heads, head_size, dtype) for layer in layers
    )


def page_bytes(
    layers: int, page_size: int, kv_heads: int, head_size: int, dtype: jax.typing.DTypeLike
) -> int:
    """Bytes of one page in all of `layers` layers, keys and values."""
    return 2 * layers * page_size * kv_heads * head_size * jnp.dtype(dtype).itemsize
