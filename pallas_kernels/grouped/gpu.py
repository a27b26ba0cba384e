"""Grouped matmul on NVIDIA GPUs (Pallas, Triton lowering).

    y[n] = x[n] @ weight[expert of n]                x [N, in] sorted by expert, weight [Y, in, out]

One program per tile of rows (tiles.py: it begins where its expert wants) and block of columns;
neighbours share their rows, which come from the cache. It walks `in`, `depth` at a time.
A tile's unused rows repeat its last one, and are stored as that. Programs of unused tiles end at
once; rows that have no expert become zeros.

Shared memory per program: stages * depth * (tile + columns) * itemsize.
"""

# mypy: allow-untyped-calls

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from octavo.pallas_kernels.grouped.tiles import cut

OLDEST = (8, 0)
KINDS = (jnp.bfloat16, jnp.float16, jnp.float32)
LARGEST = 2**31 - 1  # elements of an array
FEWEST, MOST = 16, 128  # rows of a tile, from what tensor cores take


@dataclass(frozen=True)
class Tuning:
    """How the kernel is built for tiles of so many rows."""

    columns: int
    depth: int
    warps: int
    stages: int


def tuning(tile: int, depth: int, out: int, itemsize: int) -> Tuning:
    """Few rows wait for weights: many small programs. Many rows wait for the tensor cores."""
    few = tile <= 32
    columns = _dividing(out, 64 if few else 128)
    step = _dividing(depth, max(16, (128 if few else 64) * 2 // itemsize))
    return Tuning(columns, step, 4 if tile < 128 else 8, 4 if few else 3)


def tile_rows(N: int, X: int) -> int:
    """Rows of a tile: about those of an expert, if all have as many; a power of two."""
    rows = FEWEST
    while rows < MOST and rows * X < N:
        rows *= 2
    return rows


def why_not(x: jax.Array, weight: jax.Array, capability: tuple[int, int]) -> str | None:
    """The reason this kernel refuses these arguments, or None if it takes them."""
    if capability < OLDEST:
        return f"compute capability {capability[0]}.{capability[1]} is below 8.0"
    if x.dtype != weight.dtype or x.dtype not in KINDS:
        return f"rows are {x.dtype} and weights {weight.dtype}, not both bfloat16 or float"
    if weight.ndim != 3:
        return f"weights have {weight.ndim} axes, not 3"
    if weight.shape[1] % 16 or weight.shape[2] % 16:
        return f"matrices of {weight.shape[1]} by {weight.shape[2]} are not in multiples of 16"
    N, depth, out = *x.shape, weight.shape[2]
    if max(weight.size, N * depth, N * out) > LARGEST:
        return f"an array of more than {LARGEST:,} elements cannot be indexed with 32 bits"
    return None


def grouped_linear(
    x: jax.Array,
    weight: jax.Array,
    sizes: jax.Array,
    first: jax.Array | int = 0,
    *,
    interpret: bool = False,
) -> jax.Array:
    """x [N, in] sorted by expert, weight [Y, in, out], sizes i32[X] -> [N, out]; the X experts
    begin at weight[first]. Rows past the sum of sizes give 0."""
    (N, depth), X, out = x.shape, sizes.shape[0], weight.shape[2]
    tile = tile_rows(N, X)
    built = tuning(tile, depth, out, x.dtype.itemsize)
    expert, *rest, count = cut(sizes, N, tile, aligned=False)
    tiles = jnp.stack([expert + first, *rest], axis=1).astype(jnp.int32)
    return pl.pallas_call(
        functools.partial(_kernel, tile=tile, built=built),
        grid=(tiles.shape[0] * (out // built.columns),),
        out_shape=jax.ShapeDtypeStruct((N, out), x.dtype),
        compiler_params=plt.CompilerParams(num_warps=built.warps, num_stages=built.stages),
        name="gpu_grouped",
        interpret=interpret,
    )(tiles, count, x, weight)


def _kernel(tiles_ref, count_ref, x_ref, weight_ref, y_ref, *, tile, built):
    (_, depth), out = x_ref.shape, y_ref.shape[1]
    blocks = out // built.columns
    t, column = pl.program_id(0) // blocks, pl.program_id(0) % blocks * built.columns
    exact = x_ref.dtype == jnp.float32

    @pl.when(t < count_ref[0])
    def _():
        expert, begin, end, real = (tiles_ref[t, i] for i in (0, 2, 3, 4))
        rows = begin + jnp.minimum(jnp.arange(tile), end - begin - 1)
        columns = pl.ds(column, built.columns)

        def step(i, acc):
            part = pl.ds(i * built.depth, built.depth)
            return acc + lax.dot(
                x_ref[rows, part],
                weight_ref[expert, part, columns],
                precision=lax.Precision.HIGHEST if exact else None,
                preferred_element_type=jnp.float32,
            )

        acc = jnp.zeros((tile, built.columns), jnp.float32)
        acc = lax.fori_loop(0, real * (depth // built.depth), step, acc)
        y_ref[rows, columns] = acc.astype(y_ref.dtype)


def _dividing(size: int, most: int) -> int:
    """The largest power of two that divides `size` and is at most `most`."""
    return min(size & -size, most)
