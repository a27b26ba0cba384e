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
) -> tuple[jax.Array, Layer]:
    """Write k, v at their positions; each query sees those up to its own, and its window."""
    keys, values = cache[0].at[positions].set(k), cache[1].at[positions].set(v)
    N, H, D = q.shape
    K = keys.shape[1]
    grouped = q.reshape(N, K, H // K, D).astype(jnp.float32)
    scores = jnp.einsum("nkgd,skd->nkgs", grouped, keys.astype(jnp.float32)) * spec.scale
    if spec.softcap:
        scores = spec.softcap * jnp.tanh(scores / spec.softcap)
    at = jnp.arange(keys.shape[0])
    seen = (at <= positions[:, None]) | (not spec.causal)  # [N, S]
    if spec.layer.window:
        seen &= at > positions[:, None] - spec.layer.window
    weights = jax.nn.softmax(jnp.where(seen[:, None, None], scores, -jnp.inf), axis=-1)
    out = jnp.einsum("nkgs,skd->nkgd", weights, values.astype(jnp.float32))
    return out.reshape(N, H, D).astype(q.dtype), (keys, values)


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
