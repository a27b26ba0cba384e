"""The definition: both projections are one matrix, the gate's columns first."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def gated_linear(
    x: jax.Array, weight: jax.Array, act: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    """x [N, E], weight [E, 2 F] -> act(x @ weight[:, :F]) * (x @ weight[:, F:]) [N, F] in the dtype
    of x, summed and activated in float32."""
    both = jnp.matmul(x, weight, precision="highest", preferred_element_type=jnp.float32)
    gate, up = jnp.split(both, 2, axis=1)
    return (act(gate) * up).astype(x.dtype)
