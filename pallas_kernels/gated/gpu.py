"""Gate and up projection with their activation on Hopper (Pallas, Mosaic GPU).

    y = act(x @ weight[:, :F]) * (x @ weight[:, F:])       x [N, E], weight [E, 2 F] -> y [N, F]

XLA stores both projections and reads them again for the activation: with 8,448 rows of Llama-3.1-8B
that is 4 % of a step. Here a program multiplies the same columns of both. Every multiprocessor
keeps one program, which works on tile after tile of y. Three warpgroups:

    memory  | x and both weights, 64 of E at a time, `stages` ahead, on into the next tile
    mixer 0 | rows 0..63 of each tile, both products, then the activation
    mixer 1 | rows 64..127

Tiles are taken in bands of rows, so that those at work at one time share what the second-level
cache holds. They have 128 columns of y, or 64 where that keeps more programs at work, as for the
few columns of a small model. What lies past the last row is read as zeros and not stored. (Two
programs that share weights through the copy engine, as a cluster, were slower.)

Shared memory per program: stages * 64 * (128 + 2 * columns) * 2 + 128 * columns * 2 bytes.
"""

# mypy: allow-untyped-calls

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from octavo.pallas_kernels.mosaic import (
    PROGRAMS,
    compiler_params,
    tiled,
    when,
    writes_through_references,
)

HOPPER = (9, 0)
ROWS = 64  # of one mixer: the M of a wgmma
MIXERS = 2
BLOCK = MIXERS * ROWS
COLUMNS = 128  # of y that a tile has
HALF = COLUMNS // 2
HALF_TIME = 0.6  # of a tile's: a product of 64 columns reads x as often as one of 128
DEPTH = 64  # of E that a stage holds: 128 bytes, a swizzled row
STAGES = 4
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


@dataclass(frozen=True)
class Tuning:
    """How the kernel is built; the default is what was measured to be the fastest."""

    band: int = 16  # tiles of rows that are worked on at one time


@dataclass(frozen=True)
class _Static:
    """What the kernel's parts share and what is known when it is built."""

    steps: int  # stages that a tile takes
    rows: int  # tiles of rows
    blocks: int  # tiles of columns
    columns: int  # of a tile
    band: int
    act: Any
    dtype: Any


class _Shared(NamedTuple):
    x_tiles: Any  # [STAGES, BLOCK, DEPTH]
    weights: Any  # [STAGES, 2, DEPTH, columns]
    y_tiles: Any  # [MIXERS, ROWS, columns]
    arrived: Any  # [STAGES]
    freed: Any  # [STAGES]


def why_not(x: jax.Array, weight: jax.Array, act: str, capability: tuple[int, int]) -> str | None:
    """The reason this kernel refuses these arguments, or None if it takes them."""
    if act not in ACTIVATIONS:
        return f"activation {act} is none of {', '.join(ACTIVATIONS)}"
    if capability != HOPPER:
        return "compute capability {}.{} is not 9.0".format(*capability)
    if not writes_through_references():
        return f"jax {jax.__version__} is older than 0.11"
    if x.dtype not in (jnp.bfloat16, jnp.float16) or x.dtype != weight.dtype:
        return f"rows are {x.dtype} and weights {weight.dtype}: 16 bits are needed"
    if x.shape[0] % 8 or x.shape[1] % DEPTH or weight.shape[1] % (2 * COLUMNS):
        return f"x {x.shape} and weight {weight.shape} are not in multiples of 8, 64 and 2 x 128"
    return None


def columns_of(N: int, F: int) -> int:
    """The columns of a tile that take N rows the shorter time."""

    def time(columns: int, one: float) -> float:
        tiles = -(-N // BLOCK) * (F // columns)
        return -(-tiles // PROGRAMS) * one

    return HALF if time(HALF, HALF_TIME) < time(COLUMNS, 1) else COLUMNS


def _place(c: _Static, item):
    """The tile of rows and the tile of columns of an item: band after band, rows first."""
    height = -(-c.rows // -(-c.rows // c.band))  # bands of about one height
    band = lax.div(item, jnp.int32(height * c.blocks))
    item = item - band * (height * c.blocks)
    mine = jnp.minimum(height, c.rows - band * height)
    column = lax.div(item, mine)
    return band * height + item - column * mine, column


def _turns(c: _Static):
    """How many tiles this program works on."""
    items = c.rows * c.blocks
    return lax.div(items - lax.axis_index("program") + (PROGRAMS - 1), jnp.int32(PROGRAMS))


def _supply(c: _Static, m: _Shared, x_ref, weight_ref):
    """The memory warpgroup: all tiles."""
    F = c.blocks * c.columns

    def tile(turn, _):
        row, column = _place(c, lax.axis_index("program") + turn * PROGRAMS)

        def step(k, _):
            stage = lax.rem(turn * c.steps + k, jnp.int32(STAGES))
            depth, arrived = pl.ds(k * DEPTH, DEPTH), m.arrived.at[stage]
            plgpu.barrier_wait(m.freed.at[stage])
            rows = x_ref.at[pl.ds(row * BLOCK, BLOCK), depth]
            plgpu.copy_gmem_to_smem(rows, m.x_tiles.at[stage], arrived)
            for i in range(2):
                columns = weight_ref.at[depth, pl.ds(i * F + column * c.columns, c.columns)]
                plgpu.copy_gmem_to_smem(columns, m.weights.at[stage, i], arrived)
            return ()

        return lax.fori_loop(0, c.steps, step, ())

    turns = _turns(c)
    lax.fori_loop(0, turns, tile, ())
    for i in range(STAGES):  # what is freed last is waited for, too
        plgpu.barrier_wait(m.freed.at[lax.rem(turns * c.steps + i, jnp.int32(STAGES))])


def _multiply(c: _Static, m: _Shared, mine, turn):
    """A mixer's part of one tile: gate and up, f32[ROWS, columns] each.

    A stage is freed when the products of the next one are on their way.
    """

    def run(*accumulators):
        def step(k, _):
            at = turn * c.steps + k
            stage = lax.rem(at, jnp.int32(STAGES))
            plgpu.barrier_wait(m.arrived.at[stage])
            for i, acc in enumerate(accumulators):
                x = m.x_tiles.at[stage, pl.ds(mine * ROWS, ROWS)]
                plgpu.wgmma(acc, x, m.weights.at[stage, i])
            plgpu.wgmma_wait(2)

            @when(k > 0)
            def _():
                plgpu.barrier_arrive(m.freed.at[lax.rem(at - 1, jnp.int32(STAGES))])

            return ()

        lax.fori_loop(0, c.steps, step, ())
        return tuple(acc[...] for acc in accumulators)

    kind = plgpu.WGMMAAccumulatorRef((ROWS, c.columns), jnp.float32)
    both = pl.run_scoped(run, kind, kind)
    plgpu.barrier_arrive(m.freed.at[lax.rem((turn + 1) * c.steps - 1, jnp.int32(STAGES))])
    return both


def _mix(c: _Static, m: _Shared, mine, y_ref):
    """A mixer: all tiles."""
    y_tile = m.y_tiles.at[mine]

    def tile(turn, _):
        gate, up = _multiply(c, m, mine, turn)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the tile before has left y_tile
        y_tile[...] = (c.act(gate) * up).astype(c.dtype)
        plgpu.commit_smem()
        row, column = _place(c, lax.axis_index("program") + turn * PROGRAMS)
        rows = pl.ds(row * BLOCK + mine * ROWS, ROWS)
        plgpu.copy_smem_to_gmem(y_tile, y_ref.at[rows, pl.ds(column * c.columns, c.columns)])
        return ()

    for stage in range(STAGES):
        plgpu.barrier_arrive(m.freed.at[stage])
    lax.fori_loop(0, _turns(c), tile, ())
    plgpu.wait_smem_to_gmem(0)


def _kernel(c: _Static, x_ref, weight_ref, y_ref, *scratch):
    m = _Shared(*scratch)
    mine = lax.axis_index("warpgroup")

    @when(mine < MIXERS)
    def _():
        plgpu.set_max_registers(232, action="increase")
        _mix(c, m, mine, y_ref)

    @when(mine == MIXERS)
    def _():
        plgpu.set_max_registers(40, action="decrease")
        _supply(c, m, x_ref, weight_ref)


@functools.partial(jax.jit, static_argnames=("act", "tuning", "interpret"))  # layers alike: once
def gated_linear(
    x: jax.Array,
    weight: jax.Array,
    act: str,
    *,
    tuning: Tuning = Tuning(),
    interpret: Any = None,
) -> jax.Array:
    """x [N, E], weight [E, 2 F] -> [N, F] as in reference.py; act: one of ACTIVATIONS."""
    (N, E), F = x.shape, weight.shape[1] // 2
    columns = columns_of(N, F)
    how = (columns, tuning.band, ACTIVATIONS[act], x.dtype)
    c = _Static(E // DEPTH, -(-N // BLOCK), F // columns, *how)
    shared = functools.partial(plgpu.SMEM, dtype=x.dtype, transforms=tiled())
    return plgpu.kernel(
        functools.partial(_kernel, c),
        out_type=jax.ShapeDtypeStruct((N, F), x.dtype),
        scratch_types=_Shared(
            x_tiles=shared((STAGES, BLOCK, DEPTH)),
            weights=shared((STAGES, 2, DEPTH, columns)),
            y_tiles=shared((MIXERS, ROWS, columns)),
            arrived=plgpu.Barrier(num_arrivals=3, num_barriers=STAGES),
            freed=plgpu.Barrier(num_arrivals=MIXERS, num_barriers=STAGES),
        ),
        grid=(min(PROGRAMS, c.rows * c.blocks),),
        grid_names=("program",),
        num_threads=MIXERS + 1,
        thread_name="warpgroup",
        kernel_name="gated_hopper",
        compiler_params=compiler_params(),
        interpret=interpret,
    )(x, weight)
