"""One projection of a few rows on NVIDIA GPUs (Pallas, Triton lowering), with its neighbours.

    y = [add +] [silu(gate) * up of] (norm(x) @ weight)        x [N, E], N <= 16

With few rows a decode step is bound by the number of its kernels, and a projection by reading its
weights; so the norm before it, the activation and the addition after it ride along. One program per
`columns` of the result:

    for each `depth` rows of weight:   acc [16, columns] += (x * norm's weight) @ weight tile
                                       squares [16, depth] += x * x
    y = acc / rms                      the norm's factor comes last, so x is read once

No model calls it yet: with one tile for all shapes it was slower than XLA's product and its
neighbours apart (bench/gpu-notes.md); `python -m octavo.bench.gpu_rows` looks for better tiles.

Rows are padded to 16, the smallest matrix product, by repeating the last one. Operands are rounded
once, as separate steps would. Moves E * O * itemsize bytes.
"""

# mypy: allow-untyped-calls

import functools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from octavo.pallas_kernels.attention.gpu_decode import ROWS, dot


@dataclass(frozen=True)
class RowsTuning:
    """How the kernel is built; 0 leaves a size to the shape."""

    columns: int = 0  # of the result, per program
    depth: int = 0  # rows of weight, per iteration
    warps: int = 4
    stages: int = 4


TILES = 128  # read at a time, about what keeps 132 multiprocessors busy


def columns_of(width: int, gate: str) -> int:
    """Columns per program: wide tiles read better, many of them keep the card busy."""
    tiles = width * (2 if gate else 1)
    return next((n for n in (64, 32) if tiles // n >= TILES and width % n == 0), 16)


def depth_of(E: int, columns: int) -> int:
    """Rows of weight per iteration: 8 KiB of 16-bit weights where E allows it."""
    most = 4096 // columns
    return next((n for n in (256, 128, 64, 32, 16) if n <= most and E % n == 0), 0)


def why_not(x: jax.Array, weight: jax.Array, bias: jax.Array | None, gate: str) -> str | None:
    """The reason this kernel refuses these arguments, or None if it takes them."""
    E, width = weight.shape[0], math.prod(weight.shape[1:]) // (2 if gate else 1)
    if x.shape[0] > ROWS:
        return f"{x.shape[0]} rows are more than {ROWS}"
    if bias is not None:
        return "the projection has a bias"
    if gate not in ("", "silu"):
        return f"the activation is {gate}"
    if x.dtype != weight.dtype:
        return f"rows are {x.dtype} and weights are {weight.dtype}"
    if width % 16 or not depth_of(E, columns_of(width, gate)):
        return f"a projection from {E} to {width} does not divide into tiles of 16"
    return None


def _kernel(x_ref, weight_ref, *refs, normed, added, gated, eps, offset, columns, depth):
    y_ref = refs[-1]
    dtype, (N, E) = x_ref.dtype, x_ref.shape
    row = jnp.minimum(jnp.arange(ROWS), N - 1)[:, None]
    width = y_ref.shape[1]
    first = pl.program_id(0) * columns

    def step(i, carry):
        squares, *sums = carry
        x = x_ref[row, (i * depth + jnp.arange(depth))[None, :]]  # [ROWS, depth]
        if normed:
            wide = x.astype(jnp.float32)
            squares += wide * wide
            weight = offset + refs[0][pl.ds(i * depth, depth)].astype(jnp.float32)
            x = (wide * weight[None, :]).astype(dtype)
        deep = pl.ds(i * depth, depth)
        tiles = (weight_ref[deep, pl.ds(first + j * width, columns)] for j in range(len(sums)))
        sums = [acc + dot(x, tile, (1, 0)) for acc, tile in zip(sums, tiles, strict=True)]
        return squares, *sums

    zero = jnp.zeros((ROWS, columns), jnp.float32)
    squares = jnp.zeros((ROWS, depth), jnp.float32)
    carry = (squares, zero, zero) if gated else (squares, zero)
    squares, *sums = lax.fori_loop(0, E // depth, step, carry)
    if normed:  # a row's norm is one factor: it comes out of the product
        unit = lax.rsqrt(jnp.sum(squares, axis=1) / E + eps)[:, None]
        sums = [acc * unit for acc in sums]
    y, *up = (acc.astype(dtype) for acc in sums)
    if gated:
        wide = y.astype(jnp.float32)
        y = (wide / (1 + jnp.exp(-wide))).astype(dtype) * up[0]
    column = (first + jnp.arange(columns))[None, :]
    if added:
        y = refs[-2][row, column] + y
    y_ref[row, column] = y


@functools.partial(jax.jit, static_argnames=("eps", "offset", "gate", "tuning", "interpret"))
def project(
    x: jax.Array,
    weight: jax.Array,
    *,
    norm: jax.Array | None = None,
    eps: float = 0.0,
    offset: float = 0.0,
    gate: str = "",
    add: jax.Array | None = None,
    tuning: RowsTuning = RowsTuning(),
    interpret: bool = False,
) -> jax.Array:
    """x [N, E], weight [E, out...] -> [N, out...]; with `gate`, weight is [E, 2, F] and y [N, F].

    norm [E]: norm the rows first, by weights `offset` + norm. add: like y. See `why_not`.
    """
    (N, E), out = x.shape, weight.shape[2:] if gate else weight.shape[1:]
    width = math.prod(weight.shape[1:]) // (2 if gate else 1)
    columns = tuning.columns or columns_of(width, gate)
    depth = tuning.depth or depth_of(E, columns)
    extra = [] if norm is None else [norm]
    extra += [] if add is None else [add.reshape(N, width)]
    body = functools.partial(
        _kernel, normed=norm is not None, added=add is not None, gated=bool(gate), eps=eps,
        offset=offset, columns=columns, depth=depth,
    )  # fmt: skip
    y = pl.pallas_call(
        body,
        grid=(width // columns,),
        out_shape=jax.ShapeDtypeStruct((N, width), x.dtype),
        compiler_params=plt.CompilerParams(num_warps=tuning.warps, num_stages=tuning.stages),
        name="project_rows",
        interpret=interpret,
    )(x, weight.reshape(E, -1), *extra)
    return y.reshape(N, *out)
