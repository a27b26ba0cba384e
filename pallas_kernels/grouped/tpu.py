"""Grouped matmul on a TPU.

    y[n] = x[n] @ weight[expert of n]                x [N, in] sorted by expert, weight [Y, in, out]

    grid: blocks of columns, and for each of them the tiles of rows (tiles.py), aligned

        tile     0     1     2     3     4           an expert's block of columns is copied once and
        expert   0     0     2     3     3           stays for all its tiles; that of the next comes
        rows    0-15 16-20 21-31 32-47 48-63         while they are multiplied

`in` is never cut, so a product is complete when it is made. Tiles 1 and 2 are the same rows of x and
y, which stay in VMEM between them; each writes the rows that it owns. The number of tiles is known
when it runs: there are no empty steps.

VMEM: 2 blocks of weights of at most WEIGHT bytes, 2 tiles of x and 2 of y.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from octavo.pallas_kernels.grouped.tiles import cut, tile_rows

LANES = 128
PART = 256  # columns of one product
WEIGHT = 8 << 20  # the most bytes of one block of weights
VMEM = 48 << 20  # v5p and tpu7x have 64 MiB a core


def why_not(x: jax.Array, weight: jax.Array) -> str | None:
    """The reason this kernel refuses these arguments, or None if it takes them."""
    if x.dtype != weight.dtype or x.dtype not in (jnp.bfloat16, jnp.float32):
        return f"rows are {x.dtype} and weights {weight.dtype}, not both bfloat16 or float32"
    if weight.ndim == 4 and weight.shape[3] != LANES:
        return f"blocks of weights have {weight.shape[3]} columns, not {LANES}"
    if weight.ndim not in (3, 4):
        return f"weights have {weight.ndim} axes, neither 3 nor 4"
    size = weight.shape[-2] * _columns(weight) * weight.dtype.itemsize
    if size > 2 * WEIGHT:
        return f"the smallest block of weights has {size:,} bytes, more than {2 * WEIGHT:,}"
    return None


def grouped_linear(
    x: jax.Array,
    weight: jax.Array,
    sizes: jax.Array,
    first: jax.Array | int = 0,
    *,
    interpret: Any = False,
) -> jax.Array:
    """x [N, in] sorted by expert, weight [Y, in, out] or [Y, blocks, in, 128], sizes i32[X] ->
    [N, out]; the X experts begin at weight[first]. Rows past the sum of sizes give 0. Raises
    ValueError where `why_not` has a reason."""
    if refusal := why_not(x, weight):
        raise ValueError(f"the kernel for experts cannot take this: {refusal}")
    (N, depth), X = x.shape, sizes.shape[0]
    tile = min(tile_rows(N, X), N)
    tiles = cut(sizes, N, tile, aligned=True)
    columns = _columns(weight)
    out = weight.shape[1] * LANES if weight.ndim == 4 else weight.shape[2]

    def rows(c: Any, t: Any, expert: Any, start: Any, *_: Any) -> Any:
        return start[t] // tile, 0

    def weights(c: Any, t: Any, expert: Any, *_: Any) -> Any:
        return (expert[t], c, 0, 0) if weight.ndim == 4 else (expert[t], 0, c)

    def results(c: Any, t: Any, expert: Any, start: Any, *_: Any) -> Any:
        return start[t] // tile, c

    block = (None, depth, columns)
    if weight.ndim == 4:
        block = (None, columns // LANES, depth, LANES)
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=5,
        grid=(out // columns, tiles.count[0]),
        in_specs=[pl.BlockSpec((tile, depth), rows), pl.BlockSpec(block, weights)],
        out_specs=pl.BlockSpec((tile, columns), results),
    )
    return pl.pallas_call(
        functools.partial(_kernel, exact=x.dtype == jnp.float32),
        name="tpu_grouped",
        grid_spec=grid,
        out_shape=jax.ShapeDtypeStruct((N, out), x.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM
        ),
        interpret=interpret,
    )(tiles.expert + first, *tiles[1:-1], x, weight)


def _kernel(
    # SMEM i32[T]
    expert: Any,
    start: Any,
    begin: Any,
    end: Any,
    real: Any,
    # VMEM
    x: Any,  # [tile, in]
    weight: Any,  # [in, columns] or [columns / 128, in, 128]
    y: Any,  # [tile, columns]
    *,
    exact: bool,
) -> None:
    del expert
    t = pl.program_id(1)
    (tile, columns), depth = y.shape, x.shape[1]
    precision = jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT
    part = LANES if len(weight.shape) == 3 else min(PART, columns)
    del depth

    def keep(at: int, width: int, new: jax.Array | float) -> None:
        row = start[t] + jax.lax.broadcasted_iota(jnp.int32, (tile, width), 0)
        mine = (row >= begin[t]) & (row < end[t])
        old = y[:, at : at + width].astype(jnp.float32)
        y[:, at : at + width] = jnp.where(mine, new, old).astype(y.dtype)

    @pl.when(real[t] == 1)
    def _() -> None:
        for at in range(0, columns, part):
            width = min(part, columns - at)
            w = weight[at // LANES] if len(weight.shape) == 3 else weight[:, at : at + width]
            product = jax.lax.dot_general(
                x[...],
                w,
                (((1,), (0,)), ((), ())),
                precision=precision,
                preferred_element_type=jnp.float32,
            )
            keep(at, width, product)

    @pl.when(real[t] == 0)
    def _() -> None:
        keep(0, columns, 0.0)


def _columns(weight: jax.Array) -> int:
    """Columns of a block: as many whole lanes as divide the width and fit, or all."""
    depth = weight.shape[-2]
    width = weight.shape[1] * LANES if weight.ndim == 4 else weight.shape[-1]
    if width % LANES:
        return width
    fits = max(1, WEIGHT // (depth * LANES * weight.dtype.itemsize))
    lanes = width // LANES
    return LANES * max(n for n in range(1, lanes + 1) if lanes % n == 0 and n <= fits)
