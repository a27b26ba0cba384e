"""Grouped matmul: every kernel against the definition."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from octavo.pallas_kernels.grouped import gpu, reference, tpu

KERNELS = {"gpu": gpu.grouped_linear, "tpu": tpu.grouped_linear}
SIZES = [
    (3, 0, 60, 7),  # ragged, one expert empty, 30 rows past the sum
    (0, 0, 0, 0),
    (0, 100, 0, 0),
    (1, 1, 1, 97),
    (16, 32, 48, 4),  # at the edges of tiles
]
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_every_row_meets_its_own_expert(kernel: str, sizes: tuple[int, ...], dtype: str) -> None:
    check(partial(KERNELS[kernel], interpret=True), sizes, dtype, N=100)


def check(
    kernel: Callable[..., jax.Array], sizes: tuple[int, ...], dtype: str, N: int, first: int = 0
) -> None:
    """X experts of 32 by 48 in a stack of X + 2."""
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(N, 32)), dtype)
    weight = jnp.asarray(rng.normal(size=(len(sizes) + 2, 32, 48)) / 6, dtype)
    given = (x, weight, jnp.asarray(sizes, jnp.int32), jnp.int32(first))
    got = jax.jit(kernel)(*given)
    want = reference.grouped_linear(*given)
    assert got.dtype == want.dtype
    near = TOLERANCE[dtype]
    np.testing.assert_allclose(
        got.astype(jnp.float32), want.astype(jnp.float32), rtol=near, atol=near
    )
