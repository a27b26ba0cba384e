"""The shards of one model, seen from inside a program that runs on each of them.

A shard holds the logits f32[R, V / n] of the vocabulary ids from rank * V / n on. Nothing of the
size of the vocabulary crosses between shards: maxima, sums and counts of rows do.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

NOWHERE = -3e38  # a logit of no shard; finite, for those without infinities


@dataclass(frozen=True)
class Across:
    """The way to the other shards; for use under `jax.shard_map`."""

    rank: jax.Array  # i32[] which shard this is, from 0; data, for not every device knows its place
    expert_rank: jax.Array  # i32[] which part of the experts it has
    axes: tuple[str, ...]  # of the mesh
    count: int  # shards
    floats: bool = False  # only floats may cross; whole numbers below 2^24 go as such

    def total(self, x: jax.Array) -> jax.Array:
        """The sum of every shard's x, on each of them."""
        return self._cross(lambda y: jax.lax.psum(y, self.axes), x)

    def largest(self, x: jax.Array) -> jax.Array:
        return self._cross(lambda y: jax.lax.pmax(y, self.axes), x)

    def smallest(self, x: jax.Array) -> jax.Array:
        return self._cross(lambda y: jax.lax.pmin(y, self.axes), x)

    def all(self, x: jax.Array) -> jax.Array:
        """[n, ...] every shard's x, by rank."""
        return self._cross(lambda y: jax.lax.all_gather(y, self.axes), x)

    def _cross(self, send: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
        if not self.floats or jnp.issubdtype(x.dtype, jnp.floating):
            return send(x)
        return send(x.astype(jnp.float32)).astype(x.dtype)


def total(across: Across | None, x: jax.Array) -> jax.Array:
    return x if across is None else across.total(x)


def largest(across: Across | None, x: jax.Array) -> jax.Array:
    return x if across is None else across.largest(x)


def ids_of(across: Across | None, V: int) -> jax.Array:
    """i32[V] the vocabulary ids of a shard that holds V."""
    ids = jnp.arange(V, dtype=jnp.int32)
    return ids if across is None else ids + across.rank * V


def values_at(across: Across | None, logits: jax.Array, ids: jax.Array) -> jax.Array:
    """f32[R, M] the logits f32[R, V] at ids i32[R, M]."""
    if across is None:
        return _pick(logits, ids)
    V = logits.shape[1]
    at = ids - across.rank * V
    return across.largest(jnp.where((at >= 0) & (at < V), _pick(logits, at), NOWHERE))


def _pick(logits: jax.Array, ids: jax.Array) -> jax.Array:
    """f32[R, M] of logits f32[R, V] at ids i32[R, M], clipped; laid flat, as all compilers can."""
    R, V = logits.shape
    rows = jnp.arange(R, dtype=jnp.int32)[:, None]
    at = (rows * V + jnp.clip(ids, 0, V - 1)).reshape(-1)
    flat = logits.reshape(-1).at[at]
    return flat.get(mode="promise_in_bounds", wrap_negative_indices=False).reshape(ids.shape)


def log_sum_exp(across: Across | None, logits: jax.Array) -> jax.Array:
    """f32[R] log of the sum of exp(logits f32[R, V]) over the whole vocabulary."""
    top = largest(across, logits.max(-1))
    return top + jnp.log(total(across, jnp.sum(jnp.exp(logits - top[:, None]), -1)))
