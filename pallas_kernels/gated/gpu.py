"""Gate and up projection with their activation on Hopper (Pallas, Mosaic GPU).

    y = act(x @ weight[:, :F]) * (x @ weight[:, F:])       x [N, E], weight [E, 2 F] -> y [N, F]

XLA stores both projections and reads them again for the activation: with 8,448 rows of Llama-3.1-8B
that is 4 % of a step. Here a program multiplies the same columns of both. Every multiprocessor
keeps one program, which works on tile after tile of y. Three warpgroups:

    memory  | x and both weights, 64 of E at a time, `stages` ahead, on into the next tile
    mixer 0 | rows 0..63 of each tile, both products, then the activation
    mixer 1 | rows 64..127

Tiles are taken in bands of rows, so that those at work at one time share what the second-level
cache holds. Where there are few, and no more than half of the programs would have a last one, each
of these last tiles is taken by two programs, 64 of its columns each. What lies past the last row is
read as zeros and not stored. (Two programs that share weights as a cluster, through the copy
engine, were slower; so were 64 columns for all tiles.)

Shared memory per program: stages * 64 * (128 + 2 * 128) * 2 + 128 * 128 * 2 bytes.
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
    writes_through_references,
)

HOPPER = (9, 0)
ROWS = 64  # of one mixer: the M of a wgmma
MIXERS = 2
BLOCK = MIXERS * ROWS
COLUMNS = 128  # of y that a tile has
HALF = COLUMNS // 2
DEPTH = 64  # of E that a stage holds: 128 bytes, a swizzled row
STAGES = 4
FEW_TURNS = 6  # of all programs: with more, whole tiles at the end were faster
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
    band: int
    act: Any
    dtype: Any

    @property
    def left(self) -> int:
        """Tiles that do not fill a turn of all programs."""
        return self.rows * self.blocks % PROGRAMS

    @property
    def halves(self) -> int:
        """Halves that the last tiles are taken in, or 0 where they are taken whole."""
        few = self.rows * self.blocks < FEW_TURNS * PROGRAMS
        return 2 * self.left if few and 2 * self.left <= PROGRAMS else 0

    @property
    def programs(self) -> int:
        return PROGRAMS if self.rows * self.blocks >= PROGRAMS else self.halves or self.left


class _Shared(NamedTuple):
    x_tiles: Any  # [STAGES, BLOCK, DEPTH]
    weights: Any  # by width, in one place: [STAGES, 2, DEPTH, COLUMNS], [STAGES, 4, DEPTH, HALF]
    y_tiles: Any  # likewise: [MIXERS, ROWS, COLUMNS], [MIXERS, 2, ROWS, HALF]
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


def _place(c: _Static, item):
    """The tile of rows and the tile of columns of an item: band after band, rows first."""
    height = -(-c.rows // -(-c.rows // c.band))  # bands of about one height
    band = lax.div(item, jnp.int32(height * c.blocks))
    item = item - band * (height * c.blocks)
    mine = jnp.minimum(height, c.rows - band * height)
    column = lax.div(item, mine)
    return band * height + item - column * mine, column


def _turns(c: _Static):
    """How many whole tiles this program works on."""
    items = c.rows * c.blocks - c.halves // 2
    return lax.div(items - lax.axis_index("program") + (PROGRAMS - 1), jnp.int32(PROGRAMS))


def _half(c: _Static):
    """This program's half of a tile, if it has one: tile of rows, first column."""
    mine = lax.axis_index("program")
    row, column = _place(c, c.rows * c.blocks - c.left + lax.div(mine, jnp.int32(2)))
    return row, column * COLUMNS + (mine & 1) * HALF


def _each(c: _Static, turns, whole, half):
    """whole(turn, row, first column) for each tile, half(turn, row, first column) of the last."""

    def tile(turn, _):
        row, column = _place(c, lax.axis_index("program") + turn * PROGRAMS)
        whole(turn, row, column * COLUMNS)
        return ()

    lax.fori_loop(0, turns, tile, ())
    if c.halves:

        @pl.when(lax.axis_index("program") < c.halves)
        def _():
            half(turns, *_half(c))


def _supply(c: _Static, m: _Shared, x_ref, weight_ref):
    """The memory warpgroup: all tiles."""
    F = c.blocks * COLUMNS

    def tile(width, turn, row, column):
        def step(k, _):
            stage = lax.rem(turn * c.steps + k, jnp.int32(STAGES))
            depth, arrived = pl.ds(k * DEPTH, DEPTH), m.arrived.at[stage]
            plgpu.barrier_wait(m.freed.at[stage])
            rows = x_ref.at[pl.ds(row * BLOCK, BLOCK), depth]
            plgpu.copy_gmem_to_smem(rows, m.x_tiles.at[stage], arrived)
            for i in range(2):
                columns = weight_ref.at[depth, pl.ds(i * F + column, width)]
                plgpu.copy_gmem_to_smem(columns, m.weights[width].at[stage, i], arrived)
            return ()

        lax.fori_loop(0, c.steps, step, ())

    turns = _turns(c)
    _each(c, turns, functools.partial(tile, COLUMNS), functools.partial(tile, HALF))
    if c.halves:
        turns += (lax.axis_index("program") < c.halves).astype(jnp.int32)
    for i in range(STAGES):  # what is freed last is waited for, too
        plgpu.barrier_wait(m.freed.at[lax.rem(turns * c.steps + i, jnp.int32(STAGES))])


def _multiply(c: _Static, m: _Shared, mine, turn, width: int):
    """A mixer's part of one tile: gate and up, f32[ROWS, width] each.

    A stage is freed when the products of the next one are on their way.
    """

    def run(*accumulators):
        def step(k, _):
            at = turn * c.steps + k
            stage = lax.rem(at, jnp.int32(STAGES))
            plgpu.barrier_wait(m.arrived.at[stage])
            for i, acc in enumerate(accumulators):
                x = m.x_tiles.at[stage, pl.ds(mine * ROWS, ROWS)]
                plgpu.wgmma(acc, x, m.weights[width].at[stage, i])
            plgpu.wgmma_wait(2)

            @pl.when(k > 0)
            def _():
                plgpu.barrier_arrive(m.freed.at[lax.rem(at - 1, jnp.int32(STAGES))])

            return ()

        lax.fori_loop(0, c.steps, step, ())
        return tuple(acc[...] for acc in accumulators)

    kind = plgpu.WGMMAAccumulatorRef((ROWS, width), jnp.float32)
    both = pl.run_scoped(run, kind, kind)
    plgpu.barrier_arrive(m.freed.at[lax.rem((turn + 1) * c.steps - 1, jnp.int32(STAGES))])
    return both


def _mix(c: _Static, m: _Shared, mine, y_ref):
    """A mixer: all tiles."""

    def tile(width, turn, row, column):
        y_tile = m.y_tiles[width].at[mine] if width == COLUMNS else m.y_tiles[width].at[mine, 0]
        gate, up = _multiply(c, m, mine, turn, width)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the tile before has left y_tile
        y_tile[...] = (c.act(gate) * up).astype(c.dtype)
        plgpu.commit_smem()
        rows = pl.ds(row * BLOCK + mine * ROWS, ROWS)
        plgpu.copy_smem_to_gmem(y_tile, y_ref.at[rows, pl.ds(column, width)])

    for stage in range(STAGES):
        plgpu.barrier_arrive(m.freed.at[stage])
    _each(c, _turns(c), functools.partial(tile, COLUMNS), functools.partial(tile, HALF))
    plgpu.wait_smem_to_gmem(0)


def _shared(c: _Static, x_tiles, weights, y_tiles, arrived, freed) -> _Shared:
    """Weights and y by the width of their tiles."""

    def by_width(refs):
        return dict(zip((COLUMNS, HALF), refs)) if c.halves else {COLUMNS: refs}

    return _Shared(x_tiles, by_width(weights), by_width(y_tiles), arrived, freed)


def _scratch(c: _Static) -> _Shared:
    """The shared memory and barriers to ask for.

    Where tiles are halved, both widths lie in one place, stage by stage: a stage of either is as
    long, so that one is freed for the other as for its own.
    """
    shared = functools.partial(plgpu.SMEM, dtype=c.dtype, transforms=tiled())
    weights, y_tiles = shared((STAGES, 2, DEPTH, COLUMNS)), shared((MIXERS, ROWS, COLUMNS))
    if c.halves:
        weights = plgpu.RefUnion(weights, shared((STAGES, 4, DEPTH, HALF)))
        y_tiles = plgpu.RefUnion(y_tiles, shared((MIXERS, 2, ROWS, HALF)))
    return _Shared(
        x_tiles=shared((STAGES, BLOCK, DEPTH)),
        weights=weights,
        y_tiles=y_tiles,
        arrived=plgpu.Barrier(num_arrivals=3, num_barriers=STAGES),
        freed=plgpu.Barrier(num_arrivals=MIXERS, num_barriers=STAGES),
    )


def _kernel(c: _Static, x_ref, weight_ref, y_ref, *scratch):
    m = _shared(c, *scratch)
    mine = lax.axis_index("warpgroup")

    @pl.when(mine < MIXERS)
    def _():
        plgpu.set_max_registers(232, action="increase")
        _mix(c, m, mine, y_ref)

    @pl.when(mine == MIXERS)
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
    c = _Static(E // DEPTH, -(-N // BLOCK), F // COLUMNS, tuning.band, ACTIVATIONS[act], x.dtype)
    return plgpu.kernel(
        functools.partial(_kernel, c),
        out_type=jax.ShapeDtypeStruct((N, F), x.dtype),
        scratch_types=_scratch(c),
        grid=(c.programs,),
        grid_names=("program",),
        num_threads=MIXERS + 1,
        thread_name="warpgroup",
        kernel_name="gated_hopper",
        compiler_params=compiler_params(),
        interpret=interpret,
    )(x, weight)
