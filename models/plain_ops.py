"""Ops in plain jax.numpy for one sequence with a dense cache: what backends must agree with.

cache = empty_cache(model, length, dtype)
ops = plain_ops(positions)
hidden, cache = model.forward(params, tokens, positions, cache, ops)
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from octavo.models.ops import AttentionSpec, Linear, Ops, Stacks
from octavo.models.registry import Model

Layer = tuple[jax.Array, jax.Array]  # keys and values, each [length, K, D]; row p is position p


def empty_cache(model: Model, length: int, dtype: Any) -> tuple[Layer, ...]:
    """Room for `length` tokens in every layer."""
    _, K, D = model.attention
    blank = jnp.zeros((length, K, D), dtype)
    return tuple((blank, blank) for _ in model.layer_specs)


def plain_ops(positions: jax.Array) -> Ops:
    """The operations for tokens at `positions` i32[N] of one sequence."""
    return Ops(
        attend=partial(attend, positions),
        linear=linear,
        grouped_linear=grouped_linear,
        layers=loop,
    )


def attend(
    positions: jax.Array,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cache: Layer,
    spec: AttentionSpec,
    *,
    sinks: jax.Array | None = None,
    kv_scales: jax.Array | None = None,
) -> tuple[jax.Array, Layer]:
    """Write k, v at their positions; each query sees those up to its own, and its window."""
    N, H, D = q.shape
    K = k.shape[1]
    scales = jnp.ones((2, K, 1)) if kv_scales is None else kv_scales[:, :, None]
    keys, values = (
        old.at[positions].set(_stored(new, scale, old.dtype))
        for old, new, scale in zip(cache, (k, v), scales, strict=True)
    )
    grouped = q.reshape(N, K, H // K, D).astype(jnp.float32)
    read = keys.astype(jnp.float32) * scales[0]
    scores = jnp.einsum("nkgd,skd->nkgs", grouped, read) * spec.scale
    if spec.softcap:
        scores = spec.softcap * jnp.tanh(scores / spec.softcap)
    at = jnp.arange(keys.shape[0])
    seen = (at <= positions[:, None]) | (not spec.causal)  # [N, S]
    if spec.layer.window:
        seen &= at > positions[:, None] - spec.layer.window
    scores = jnp.where(seen[:, None, None], scores, -jnp.inf)
    if sinks is not None:
        own = jnp.broadcast_to(sinks.reshape(K, H // K, 1), (*scores.shape[:-1], 1))
        scores = jnp.concatenate([scores, own], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1)[..., : keys.shape[0]]
    out = jnp.einsum("nkgs,skd->nkgd", weights, values.astype(jnp.float32) * scales[1])
    return out.reshape(N, H, D).astype(q.dtype), (keys, values)


def _stored(x: jax.Array, scale: jax.Array, dtype: Any) -> jax.Array:
    """Keys or values as a cache of `dtype` keeps them: 8 bits saturate."""
    x = x.astype(jnp.float32) / scale
    if jnp.dtype(dtype).itemsize > 1:
        return x.astype(dtype)
    if jnp.issubdtype(dtype, jnp.integer):
        return jnp.clip(jnp.round(x), -127, 127).astype(dtype)
    return jnp.clip(x, -448, 448).astype(dtype)  # float8_e4m3fn's range


def linear(x: jax.Array, w: Linear) -> jax.Array:
    y = jnp.tensordot(x, w.weight, axes=1)
    return y if w.bias is None else y + w.bias


def grouped_linear(x: jax.Array, weight: jax.Array, sizes: jax.Array) -> jax.Array:
    """Every row meets the weight of its group; rows past the last group meet the last one's."""
    row = jnp.arange(x.shape[0])
    group = jnp.sum(row[:, None] >= jnp.cumsum(sizes), axis=1)
    group = jnp.minimum(group, weight.shape[0] - 1)
    return jnp.einsum("ni,nio->no", x, weight[group])


def loop(block: Any, x: jax.Array, layers: Any, cache: Any, specs: Any) -> tuple[jax.Array, Any]:
    """One layer after another."""
    kept, layers = [], layers.each() if isinstance(layers, Stacks) else layers
    for layer, kv, spec in zip(layers, cache, specs, strict=True):
        x, kv = block(x, layer, kv, spec)
        kept.append(kv)
    return x, tuple(kept)
