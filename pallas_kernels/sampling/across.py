"""The shards of one model, seen from inside a program that runs on each of them.

A shard holds the logits f32[R, V / n] of the vocabulary ids from rank * V / n on. Nothing of the
size of the vocabulary crosses between shards: maxima, sums and counts of rows do.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

LEAST = -3e38  # less than every logit, for devices without infinities


@dataclass(frozen=True)
class Across:
    """The way to the other shards; for use under `jax.shard_map`."""

    rank: jax.Array  # i32[] which shard this is, from 0; data, for not every device knows its place
    expert_rank: jax.Array  # i32[] which part of the experts it has
    axes: tuple[str, ...]  # of the mesh
    count: int  # shards

    def total(self, x: jax.Array) -> jax.Array:
        """The sum of every shard's x, on each of them."""
        return jax.lax.psum(x, self.axes)

    def largest(self, x: jax.Array) -> jax.Array:
        return jax.lax.pmax(x, self.axes)

    def smallest(self, x: jax.Array) -> jax.Array:
        return jax.lax.pmin(x, self.axes)

    def all(self, x: jax.Array) -> jax.Array:
        """[n, ...] every shard's x, by rank."""
        return jax.lax.all_gather(x, self.axes)


def total(across: Across | None, x: jax.Array) -> jax.Array:
    return x if across is None else across.total(x)


def largest(across: Across | None, x: jax.Array) -> jax.Array:
    return x if across is None else across.largest(x)


def ids_of(across: Across | None, V: int) -> jax.Array:
    """i32[V] the vocabulary ids of a shard that holds V."""
    ids = jnp.arange(V, dtype=jnp.int32)
    return ids if across is None else ids + across.rank * V


def values_at(across: Across | None, values: jax.Array, ids: jax.Array) -> jax.Array:
    """[R, M] of values [R, V], such as logits, at vocabulary ids i32[R, M]."""
    R, V = values.shape
    at = ids if across is None else ids - across.rank * V
    rows = jnp.arange(R, dtype=jnp.int32)[:, None]
    places = (rows * V + jnp.clip(at, 0, V - 1)).reshape(-1)
    flat = values.reshape(-1).at[places]
    picked = flat.get(mode="promise_in_bounds", wrap_negative_indices=False).reshape(ids.shape)
    if across is None:
        return picked
    return across.largest(jnp.where((at >= 0) & (at < V), picked, LEAST))


def log_sum_exp(across: Across | None, logits: jax.Array) -> jax.Array:
    """f32[R] the logarithm of the sum of exp(logits f32[R, V]) over the whole vocabulary."""
    top = largest(across, logits.max(-1))
    return top + jnp.log(total(across, jnp.sum(jnp.exp(logits - top[:, None]), -1)))
