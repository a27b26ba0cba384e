"""The definition: rows of x lie expert by expert, and each meets its expert's weight."""

import jax
import jax.numpy as jnp


def grouped_linear(
    x: jax.Array, weight: jax.Array, sizes: jax.Array, first: jax.Array | int = 0
) -> jax.Array:
    """x [N, in] sorted by expert, weight [Y, in, out] or [Y, blocks, in, columns], sizes i32[X] ->
    [N, out] in the dtype of x, summed in float32. Expert e has sizes[e] rows and weight[first + e];
    rows past the sum of sizes give 0.
    """
    N, X = x.shape[0], sizes.shape[0]
    if weight.ndim == 4:
        weight = weight.swapaxes(1, 2).reshape(weight.shape[0], weight.shape[2], -1)
    ends = jnp.cumsum(sizes)
    expert = jnp.sum(jnp.arange(N)[:, None] >= ends, axis=1)

    def one(y: jax.Array, e: jax.Array) -> tuple[jax.Array, None]:
        every = jnp.matmul(
            x, weight[first + e], precision="highest", preferred_element_type=jnp.float32
        )
        return jnp.where((expert == e)[:, None], every, y), None

    y, _ = jax.lax.scan(one, jnp.zeros((N, weight.shape[2]), jnp.float32), jnp.arange(X))
    return y.astype(x.dtype)
