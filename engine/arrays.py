"""The few indexing operations that the state functions use: every backend compiles them.

Indices are one-dimensional and in bounds by construction: the caller points what is not wanted at a
cell that takes padding.
"""

import jax
import jax.numpy as jnp


def take(x: jax.Array, index: jax.Array) -> jax.Array:
    """x[index]: rows of x [N, ...] at index i32[n], all in bounds."""
    return x.at[index].get(mode="promise_in_bounds", wrap_negative_indices=False)


def put(x: jax.Array, index: jax.Array, values: jax.Array) -> jax.Array:
    """x with x[index] = values; a place named twice must get the same value twice, or be trash."""
    return x.at[index].set(values, mode="promise_in_bounds", wrap_negative_indices=False)


def add(x: jax.Array, index: jax.Array, values: jax.Array) -> jax.Array:
    """x with x[index] += values, as often as a place is named; floats only."""
    return x.at[index].add(values, mode="promise_in_bounds", wrap_negative_indices=False)


def put_where(x: jax.Array, index: jax.Array, wanted: jax.Array, values: jax.Array) -> jax.Array:
    """x [n] with x[index] = values where `wanted` bool; x has no cell for the rest, so gets one."""
    spare = jnp.concatenate([x, jnp.zeros((1,), x.dtype)])
    return put(spare, jnp.where(wanted, index, x.shape[0]), values)[:-1]


def running_sum(x: jax.Array) -> jax.Array:
    """i32[n]: x[0] + ... + x[i], in log2(n) shifted additions."""
    step = 1
    while step < x.shape[0]:
        x = x + jnp.concatenate([jnp.zeros((step,), x.dtype), x[:-step]])
        step *= 2
    return x


def some(x: jax.Array, axis: int) -> jax.Array:
    """jnp.any, as a maximum of integers."""
    return jnp.max(x.astype(jnp.int32), axis=axis) > 0


def copy_row(x: jax.Array, src: jax.Array, dst: jax.Array) -> jax.Array:
    """x [B, ...] with row dst a copy of row src; i32[]."""
    if x.dtype == jnp.bool_:
        return copy_row(x.astype(jnp.int32), src, dst) != 0
    return put(x, dst[None], take(x, src[None]))
