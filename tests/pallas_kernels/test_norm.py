"""Addition and norm in one kernel against the model's own two."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from octavo.models.layers import rms_norm
from octavo.pallas_kernels.norm import gpu


@pytest.mark.parametrize(("N", "E"), [(1, 256), (5, 1024), (3, 4096)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("added", [False, True])
def test_the_kernel_adds_and_norms_as_the_model_would(
    N: int, E: int, dtype: str, added: bool
) -> None:
    keys = jax.random.split(jax.random.key(N), 3)
    x, y = (3 * jax.random.normal(key, (N, E)).astype(dtype) for key in keys[:2])
    weight = jax.random.normal(keys[2], (E,)).astype(dtype)
    total, normed = gpu.add_norm(x, y if added else None, weight, 1e-5, 1.0, interpret=True)
    want = x + y if added else x
    assert np.array_equal(total, want)
    close = 1e-5 if dtype == "float32" else 1e-2
    wanted = rms_norm(want, weight, 1e-5, 1.0)
    assert normed.dtype == wanted.dtype
    np.testing.assert_allclose(
        normed.astype(jnp.float32), wanted.astype(jnp.float32), rtol=close, atol=close
    )


def test_rows_that_a_program_cannot_read_whole_are_refused() -> None:
    with pytest.raises(ValueError, match="rows of 576 elements are no power of two up to 16384"):
        gpu.add_norm(jnp.zeros((1, 576)), None, jnp.zeros((576,)), 1e-5)
