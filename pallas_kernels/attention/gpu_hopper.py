"""Chunked prefill attention for Hopper (Pallas, Mosaic GPU): wgmma, pages through the copy engine.

    y[t, h] = sum_j softmax_j(scale * q[t, h] . k[j, h // G]) v[j, h // G]      j <= position of t

The blocks are those of gpu_prefill.py, 128 tokens each, from a multiple of 8, which is how the copy
engine counts rows. One program per (block, query head), of three warpgroups:

    memory   | page ids -> k tile -> v tile | page ids -> k tile -> v tile | ...  stages tiles ahead
    mixer 0  |  q.k  |  softmax  |  p.v  |  q.k  |  softmax  | ...                tokens 0..63
    mixer 1          |  q.k  |  softmax  |  p.v  |  q.k  |  softmax  | ...        tokens 64..127

The mixers take turns at the tensor cores: while one computes its softmax the other multiplies. A
tile of keys is a run of pages, each one copy of [S, D]; where pages are larger, part of one.

Shared memory per program: (2 * 64 + 2 * stages * tile) * D * 2 bytes; q and y share theirs.
"""

# mypy: allow-untyped-calls

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from octavo.pallas_kernels.attention.batch import RaggedBatch
from octavo.pallas_kernels.attention.gpu_decode import LOG2E, NOTHING, cap, log2
from octavo.pallas_kernels.attention.gpu_prefill import plan_prefill
from octavo.pallas_kernels.attention.reference import KV

ROWS = 64  # tokens of one mixer: the M of a wgmma
MIXERS = 2
BLOCK = MIXERS * ROWS


def writes_through_references() -> bool:
    """Whether a kernel inside `jit` can write to a reference made there: jax 0.11 and later."""
    return tuple(int(n) for n in jax.__version__.split(".")[:2]) >= (0, 11)


def why_not_hopper(q: jax.Array, k_pages: jax.Array) -> str | None:
    """The reason this kernel refuses these arguments, or None if it takes them."""
    P, K, S, D = k_pages.shape
    if not writes_through_references():
        return f"jax {jax.__version__} is older than 0.11"
    if D not in (64, 128):
        return f"D={D} is neither 64 nor 128"
    if S % 8:
        return f"pages of {S} tokens are not a multiple of 8"
    if q.shape[1] % K:
        return f"H={q.shape[1]} query heads do not divide into K={K} groups"
    if q.dtype not in (jnp.bfloat16, jnp.float16) or q.dtype != k_pages.dtype:
        return f"queries are {q.dtype} and the cache is {k_pages.dtype}: 16 bits are needed"
    return None


def _transposed(ref):
    """A view of a tile with its axes exchanged."""
    return ref.transpose((1, 0)) if hasattr(ref, "transpose") else plgpu.transpose_ref(ref, (1, 0))


@dataclass(frozen=True)
class _Static:
    """What the kernel's parts share and what is known when it is built."""

    G: int
    K: int
    S: int
    D: int
    tile: int
    run: int  # tokens of a tile that one copy brings
    stages: int
    window: int
    scale: float
    softcap: float
    dtype: Any

    @property
    def pieces(self) -> int:
        return self.tile // self.run


class _Walk(NamedTuple):
    """One block: its tokens, and the keys it walks over."""

    token: jax.Array  # the first, a multiple of 8
    size: jax.Array  # tokens; 0 marks an unused entry
    position: jax.Array  # of the first token
    lead: jax.Array  # tokens at the beginning that are not the chunk's
    row: jax.Array  # of the table
    end: jax.Array  # keys seen
    first: jax.Array  # tile of keys
    last: jax.Array  # tile of keys, not seen any more


def _walk(c: _Static, plan_ref, entry):
    """Read the block's entry, and find the tiles of keys it sees."""
    token, size, position, slot, lead = (plan_ref[entry, i] for i in range(5))
    end = jnp.where(slot < 0, 0, position + size)
    low = jnp.maximum(position + 1 - c.window, 0) if c.window else jnp.int32(0)
    first, last = lax.div(low, jnp.int32(c.tile)), lax.div(end + (c.tile - 1), jnp.int32(c.tile))
    first = jnp.minimum(first, last)
    return _Walk(token, size, position, lead, jnp.maximum(slot, 0), end, first, last)


def _fetch(c: _Static, walk, head, table_ref, k_pages, v_pages, k_tiles, v_tiles, arrived, freed):
    """The memory warpgroup: keep `stages` tiles on their way to the mixers."""
    row, end, first, last = walk.row, walk.end, walk.first, walk.last
    kv_head = lax.div(head, jnp.int32(c.G))
    k_arrived, v_arrived = arrived
    k_freed, v_freed = freed

    def pages(i):
        """Where the pages of tile i begin among the [P * K * S, D] rows; past the end, the last."""
        for piece in range(c.pieces):
            at = jnp.minimum(i * c.tile + piece * c.run, end - 1)
            page = table_ref[row, lax.shift_right_logical(at, jnp.int32(log2(c.S)))]
            offset = (i * c.tile) & (c.S - 1) if c.S > c.tile else 0
            yield piece * c.run, (page * c.K + kv_head) * c.S + offset

    def copy(source, tiles, barriers, stage, places):
        for begin, where in places:
            plgpu.copy_gmem_to_smem(
                source.at[pl.ds(where, c.run)],
                tiles.at[stage, pl.ds(begin, c.run)],
                barriers.at[stage],
            )

    @pl.loop(0, last - first)
    def _(i):
        stage = lax.rem(i, jnp.int32(c.stages))
        places = list(pages(first + i))

        @pl.when(i >= c.stages)
        def _():
            plgpu.barrier_wait(k_freed.at[stage])

        copy(k_pages, k_tiles, k_arrived, stage, places)

        @pl.when(i >= c.stages)
        def _():
            plgpu.barrier_wait(v_freed.at[stage])

        copy(v_pages, v_tiles, v_arrived, stage, places)


def _mix(c: _Static, walk, mine, q_tile, k_tiles, v_tiles, arrived, freed, turn):
    """One mixer: the online softmax over all tiles. Returns its results, f32[ROWS, D]."""
    size, position, first, last = walk.size, walk.position, walk.first, walk.last
    at = position + mine * ROWS
    k_arrived, v_arrived = arrived
    k_freed, v_freed = freed

    def meet():
        plgpu.barrier_arrive(turn)
        plgpu.barrier_wait(turn)

    def seen(tile):
        shape, layout = (ROWS, c.tile), plgpu.Layout.WGMMA
        t = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=layout) + at
        j = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=layout) + tile * c.tile
        return (t >= j) & (j > t - c.window) if c.window else t >= j

    def step(tile, carry, masked):
        acc, top, total = carry
        stage = lax.rem(tile - first, jnp.int32(c.stages))
        plgpu.barrier_wait(k_arrived.at[stage])

        def product(x_ref):
            plgpu.wgmma(x_ref, q_tile, _transposed(k_tiles.at[stage]))
            meet()  # the other mixer may multiply now
            return x_ref[...]

        x = pl.run_scoped(product, plgpu.WGMMAAccumulatorRef((ROWS, c.tile), jnp.float32))
        plgpu.barrier_arrive(k_freed.at[stage])
        unit = c.scale * LOG2E
        if masked or c.softcap:
            x, unit = cap(x * unit, c.softcap), 1.0
        if masked:  # scaled before: NOTHING times a unit, fused, would not be NOTHING minus itself
            x = jnp.where(seen(tile), x, NOTHING)
        peak = jnp.maximum(top, x.max(axis=1) * unit)
        shrink = jnp.exp2(top - peak)
        p = jnp.exp2(x * unit - lax.broadcast_in_dim(peak, x.shape, [0]))
        acc *= lax.broadcast_in_dim(shrink, acc.shape, [0])
        total = total * shrink + p.sum(axis=1)
        p = p.astype(c.dtype)
        acc, total, peak, p = lax.optimization_barrier((acc, total, peak, p))
        plgpu.barrier_arrive(turn)
        plgpu.barrier_wait(v_arrived.at[stage])
        plgpu.barrier_wait(turn)

        def add(acc_ref):
            plgpu.wgmma(acc_ref, p, v_tiles.at[stage])

        acc = pl.run_state(add)(plgpu.WGMMAAccumulatorRef.init(acc))
        plgpu.barrier_arrive(v_freed.at[stage])
        return acc, peak, total

    row = plgpu.Layout.WGMMA.reduce(1)
    carry = (
        plgpu.layout_cast(jnp.zeros((ROWS, c.D), jnp.float32), plgpu.Layout.WGMMA),
        plgpu.layout_cast(jnp.full((ROWS,), NOTHING, jnp.float32), row),
        plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), row),
    )
    pl.when(mine == 1)(meet)  # mixer 1 runs half a step behind
    whole = jnp.clip(lax.div(position + 1, jnp.int32(c.tile)), first, last)
    masked, plain = functools.partial(step, masked=True), functools.partial(step, masked=False)
    begin = first
    if c.window:
        edge = lax.div(jnp.maximum(position + size - c.window, 0) + c.tile - 1, jnp.int32(c.tile))
        begin = jnp.clip(edge, first, last)
        whole = jnp.maximum(whole, begin)
        carry = lax.fori_loop(first, begin, masked, carry)
    carry = lax.fori_loop(begin, whole, plain, carry)
    acc, _, total = lax.fori_loop(whole, last, masked, carry)
    pl.when(mine == 0)(meet)
    return acc / lax.broadcast_in_dim(jnp.maximum(total, 1e-30), acc.shape, [0])


def _store(c: _Static, y, walk, mine, head, y_tile, y_ref):
    """Write the rows that are tokens of this block: as few copies as their number has bits."""
    y_tile[...] = y.astype(c.dtype)
    plgpu.commit_smem()
    low = jnp.clip(walk.lead - mine * ROWS, 0, ROWS)
    count = jnp.clip(walk.size - mine * ROWS, 0, ROWS) - low
    for bit in range(log2(ROWS), -1, -1):
        length = 1 << bit

        @pl.when(count & length != 0)
        def _(length=length):
            begin = low + (count & -2 * length)  # after what the larger copies took
            where = walk.token + mine * ROWS + begin
            plgpu.copy_smem_to_gmem(
                y_tile.at[pl.ds(begin, length)], y_ref.at[pl.ds(where, length), head]
            )

    plgpu.wait_smem_to_gmem(0)


def _kernel(c: _Static, plan_ref, table_ref, q_ref, k_pages, v_pages, y_ref, *scratch):
    (q_tiles, y_tiles), k_tiles, v_tiles, q_arrived, k_arrived, v_arrived, *rest = scratch
    k_freed, v_freed, turn = rest
    head, entry, mine = (lax.axis_index(name) for name in ("head", "entry", "warpgroup"))
    walk = _walk(c, plan_ref, entry)
    arrived, freed = (k_arrived, v_arrived), (k_freed, v_freed)

    @pl.when(mine < MIXERS)
    def _():
        plgpu.set_max_registers(232, action="increase")

        @pl.when(walk.size > 0)
        def _():
            q_tile = q_tiles.at[mine]
            source = q_ref.at[pl.ds(walk.token + mine * ROWS, ROWS), head]
            plgpu.copy_gmem_to_smem(source, q_tile, q_arrived.at[mine])
            plgpu.barrier_wait(q_arrived.at[mine])
            y = _mix(c, walk, mine, q_tile, k_tiles, v_tiles, arrived, freed, turn)
            _store(c, y, walk, mine, head, y_tiles.at[mine], y_ref)

    @pl.when(mine == MIXERS)
    def _():
        plgpu.set_max_registers(40, action="decrease")

        @pl.when(walk.size > 0)
        def _():
            _fetch(c, walk, head, table_ref, k_pages, v_pages, k_tiles, v_tiles, arrived, freed)


def prefill_hopper(
    q: jax.Array,
    y: jax.Array,
    cache: KV,
    batch: RaggedBatch,
    *,
    window: int = 0,
    scale: float,
    softcap: float = 0.0,
    tile: int = 128,
    stages: int = 2,
    interpret: Any = None,
) -> jax.Array:
    """Attend the chunks' tokens, whose keys are in their pages: q, y [N, H, D] -> y [N, H, D].

    The rows' part of y is kept, the chunks' part replaced; padding tokens become zeros. All pages
    must hold finite numbers: what lies past a sequence's end is multiplied by zero.
    """
    (N, H, D), (P, K, S, _) = q.shape, cache.k.shape
    base = batch.table.shape[0] * batch.tokens_per_row
    plan = plan_prefill(batch, N - base, BLOCK, base=base, align=8)
    c = _Static(
        G=H // K, K=K, S=S, D=D, tile=tile, run=min(S, tile), stages=stages, window=window,
        scale=scale, softcap=softcap, dtype=q.dtype,
    )  # fmt: skip
    tiled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    pages = plgpu.SMEM((stages, tile, D), q.dtype, transforms=tiled)
    arrived = plgpu.Barrier(num_arrivals=c.pieces, num_barriers=stages)
    freed = plgpu.Barrier(num_arrivals=MIXERS, num_barriers=stages)
    if N % 8:  # the copy engine counts rows in tiles of 8
        q = jnp.pad(q, ((0, -N % 8), (0, 0), (0, 0)))
    y_ref = jax.new_ref(y)
    plgpu.kernel(
        functools.partial(_kernel, c),
        out_type=(),
        scratch_types=(
            plgpu.RefUnion(  # a mixer is done with its queries when it has its results
                plgpu.SMEM((MIXERS, ROWS, D), q.dtype, transforms=tiled),
                plgpu.SMEM((MIXERS, ROWS, D), q.dtype),
            ),
            pages, pages, plgpu.Barrier(num_barriers=MIXERS), arrived, arrived, freed, freed,
            plgpu.Barrier(num_arrivals=MIXERS),
        ),
        grid=(H, plan.shape[0]),
        grid_names=("head", "entry"),
        num_threads=MIXERS + 1,
        thread_name="warpgroup",
        kernel_name="paged_prefill_hopper",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        interpret=interpret,
    )(
        plan, batch.table, q, cache.k.reshape(P * K * S, D), cache.v.reshape(P * K * S, D), y_ref
    )  # fmt: skip
    return jax.freeze(y_ref)
