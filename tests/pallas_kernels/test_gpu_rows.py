"""Projections of a few rows with their neighbours, interpreted, against their parts one by one."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from octavo.pallas_kernels.linear import gpu_rows


def normal(*shape: int, dtype: str) -> jax.Array:
    rng = np.random.default_rng(sum(shape))
    return jnp.asarray(rng.normal(size=shape), dtype)


def apart(x: jax.Array, weight: jax.Array, norm: Any, gate: str, add: Any) -> jax.Array:
    wide = x.astype(jnp.float32)
    if norm is not None:
        unit = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + 1e-6)
        x = (wide * unit * norm.astype(jnp.float32)).astype(x.dtype)
    y = jnp.tensordot(x.astype(jnp.float32), weight.astype(jnp.float32), 1).astype(x.dtype)
    return add + (jax.nn.silu(y[:, 0]) * y[:, 1] if gate else y)


@pytest.mark.parametrize(
    ("N", "normed", "gate", "dtype", "tolerance"),
    [(1, True, "silu", "float32", 2e-6), (5, False, "", "float32", 2e-6),
     (5, True, "silu", "bfloat16", 6e-3)],
)  # fmt: skip
def test_one_kernel_gives_what_its_parts_give(
    N: int, normed: bool, gate: str, dtype: str, tolerance: float
) -> None:
    E, F = 96, 64
    x, add = normal(N, E, dtype=dtype), normal(N, F, dtype=dtype)
    weight = normal(E, 2, F, dtype=dtype) if gate else normal(E, F, dtype=dtype)
    weight /= E**0.5
    norm = normal(E, dtype=dtype) if normed else None
    assert gpu_rows.why_not(x, weight, None, gate) is None
    got = gpu_rows.project(x, weight, norm=norm, eps=1e-6, gate=gate, add=add, interpret=True)
    want = apart(x, weight, norm, gate, add)
    assert got.shape == want.shape
    got, want = got.astype(jnp.float32), want.astype(jnp.float32)
    assert jnp.linalg.norm(got - want) < tolerance * jnp.linalg.norm(want)


def test_lowers_for_cuda() -> None:
    x, weight = normal(1, 1024, dtype="bfloat16"), normal(1024, 8, 4, 128, dtype="bfloat16")

    def run(x: jax.Array, weight: jax.Array) -> jax.Array:
        return gpu_rows.project(x, weight, norm=x[0], eps=1e-6)

    traced = jax.jit(run).trace(x, weight)
    assert "project_rows" in traced.lower(lowering_platforms=("cuda",)).as_text()


def test_says_why_it_refuses_many_rows() -> None:
    x, weight = normal(17, 64, dtype="bfloat16"), normal(64, 64, dtype="bfloat16")
    assert gpu_rows.why_not(x, weight, None, "") == "17 rows are more than 16"
