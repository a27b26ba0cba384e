"""Grouped matmul: every kernel against the definition."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from octavo.pallas_kernels.grouped import gpu, reference, tpu
from octavo.pallas_kernels.grouped.tiles import cut

KERNELS = {
    name: jax.jit(partial(kernel.grouped_linear, interpret=True))
    for name, kernel in (("gpu", gpu), ("tpu", tpu))
}
REFERENCE = jax.jit(reference.grouped_linear)
SIZES = [
    (3, 0, 60, 7),  # ragged, one expert empty, 30 rows past the sum
    (0, 0, 0, 0),
    (0, 100, 0, 0),
    (1, 1, 1, 97),
    (16, 32, 48, 4),  # at the edges of tiles
]
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}


def check(
    kernel: str,
    sizes: tuple[int, ...],
    dtype: str = "float32",
    shape: tuple[int, int, int] = (100, 32, 48),  # N, in, out
    first: int = 0,
    columns: int = 0,
) -> None:
    """Experts in a stack of two more; columns: in blocks of so many."""
    N, depth, out = shape
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(N, depth)), dtype)
    weight = jnp.asarray(rng.normal(size=(len(sizes) + 2, depth, out)) / depth**0.5, dtype)
    if columns:
        weight = weight.reshape(len(sizes) + 2, depth, -1, columns).swapaxes(1, 2)
    given = (x, weight, jnp.asarray(sizes, jnp.int32), jnp.int32(first))
    got, want = KERNELS[kernel](*given), REFERENCE(*given)
    assert got.dtype == want.dtype == x.dtype
    near = TOLERANCE[dtype]
    np.testing.assert_allclose(
        got.astype(jnp.float32), want.astype(jnp.float32), rtol=near, atol=near
    )


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("sizes", SIZES)
def test_every_row_meets_its_own_expert(kernel: str, sizes: tuple[int, ...]) -> None:
    check(kernel, sizes)


@pytest.mark.parametrize("kernel", KERNELS)
def test_sixteen_bits_are_summed_in_float32(kernel: str) -> None:
    check(kernel, SIZES[0], "bfloat16", (100, 512, 48))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("N", [1, 8, 300])
def test_any_number_of_rows_and_a_place_in_a_stack(kernel: str, N: int) -> None:
    sizes = tuple(int(n) for n in np.bincount(np.arange(N) % 7 * 3 % 5, minlength=6))
    check(kernel, sizes, shape=(N, 32, 48), first=2)


def test_blocks_of_columns_are_copied_one_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tpu, "BLOCK", {True: 96 << 10})  # 384 columns: a product and a half
    for blocked in (0, 128):
        check("tpu", (3, 0, 60, 7), shape=(100, 64, 768), first=1, columns=blocked)


def test_the_reference_is_a_sum_per_row() -> None:
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=(5, 4)), rng.normal(size=(3, 4, 6))
    sizes = jnp.array([2, 0, 1], jnp.int32)
    got = REFERENCE(jnp.asarray(x, jnp.float32), jnp.asarray(weight, jnp.float32), sizes)
    want = np.stack([x[0] @ weight[0], x[1] @ weight[0], x[2] @ weight[2], *np.zeros((2, 6))])
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
def test_each_row_is_in_one_tile_of_its_expert(sizes: tuple[int, ...], aligned: bool) -> None:
    tiles = cut(jnp.asarray(sizes, jnp.int32), 100, 16, aligned=aligned)
    count = int(tiles.used[0])
    assert count <= tiles.expert.shape[0]
    want = [(e, 1) for e, n in enumerate(sizes) for _ in range(n)]
    got: list[tuple[int, int]] = []
    for t in range(count):
        expert, start, begin, end, real = (int(field[t]) for field in tiles[:-1])
        assert start <= begin < end <= start + 16 and (not aligned or start % 16 == 0)
        assert begin == len(got)
        got += [(expert, real)] * (end - begin)
    assert len(got) == 100 and got[: len(want)] == want
    assert not any(real for _, real in got[len(want) :])


def test_what_a_kernel_cannot_take_is_named() -> None:
    x, weight = jnp.zeros((8, 96), jnp.bfloat16), jnp.zeros((4, 96, 200), jnp.bfloat16)
    assert gpu.why_not(x, weight, (9, 0)) == "matrices of 96 by 200 are not in multiples of 16"
    assert gpu.why_not(x, weight, (7, 5)) == "compute capability 7.5 is below 8.0"
    assert tpu.why_not(x, weight) is None
    assert "bfloat16 and weights float32" in str(tpu.why_not(x, weight.astype(jnp.float32)))
    with pytest.raises(ValueError, match="smallest block of weights has 25,600,000 bytes"):
        tpu.grouped_linear(
            jnp.zeros((8, 64000), jnp.bfloat16),
            jnp.zeros((1, 64000, 200), jnp.bfloat16),
            jnp.zeros((1,), jnp.int32),
        )
