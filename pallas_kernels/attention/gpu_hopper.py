"""Chunked prefill attention for Hopper (Pallas, Mosaic GPU): wgmma, pages through the copy engine.

    y[t, h] = sum_j softmax_j(scale * q[t, h] . k[j, h // G]) v[j, h // G]      j <= position of t

The blocks are those of gpu_prefill.py, 128 tokens each. Every multiprocessor keeps one program,
which works on its share of the (block, query head) pairs, those that see most keys first; in each
it walks from the last tile of keys to the first, so that masks come first. Three warpgroups:

    memory   | page ids -> k tile -> v tile | page ids -> k tile -> v tile | ...  stages tiles ahead
    mixer 0  | q.k 1, p.v 0 |  softmax 1   | q.k 2, p.v 1 |  softmax 2   | ...    tokens 0..63
    mixer 1                 | q.k 1, p.v 0 |  softmax 1   | q.k 2, p.v 1 | ...    tokens 64..127

A mixer hands the tensor cores the logits of a tile and the values of the one before together, and
takes the softmax as soon as the logits are there: while the values are added, and while the other
mixer has the tensor cores. The two take turns. A block's last values go with the first logits of
the next block, so that the tensor cores do not rest in between. A tile of keys is a run of pages,
each one copy of [S, D]; where pages are larger, part of one.

What the compiler must not disturb: registers that a wgmma in flight reads are written only after
it (else it makes all of them wait), and a softmax stays before the wait that follows it.

Shared memory per program: (6 * 64 + 2 * stages * tile) * D * 2 bytes.
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
from octavo.pallas_kernels.mosaic import (
    PROGRAMS,
    SLICE,
    compiler_params,
    one_if,
    put,
    tiled,
    transposed,
    when,
    writes_through_references,
)

ROWS = 64  # tokens of one mixer: the M of a wgmma
MIXERS = 2
BLOCK = MIXERS * ROWS
EIGHT = 8  # columns of a wgmma's accumulator that a quad of threads holds together


@dataclass(frozen=True)
class HopperTuning:
    """How the kernel is built; the defaults are what was measured to be the fastest."""

    tile: int = 128  # keys
    stages: int = 2  # tiles of keys and of values on their way
    least: int = 0  # tokens of chunks from which this kernel is taken


HOPPER = HopperTuning()


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


@dataclass(frozen=True)
class _Static:
    """What the kernel's parts share and what is known when it is built."""

    H: int
    K: int
    S: int
    D: int
    tile: int
    run: int  # tokens of a tile that one copy brings
    stages: int
    programs: int
    window: int
    scale: float
    softcap: float
    dtype: Any
    sinks: bool

    @property
    def pieces(self) -> int:
        return self.tile // self.run

    @property
    def slices(self) -> int:
        return self.D // SLICE


class _Shared(NamedTuple):
    """Shared memory and barriers of a program."""

    q_views: Any  # [2, MIXERS, D / SLICE, ROWS, SLICE], for the mixers and for the copy engine
    y_tiles: Any  # [MIXERS, ROWS, D]
    k_tiles: Any  # [stages, tile, D]
    v_tiles: Any
    q_arrived: Any  # [2 * MIXERS]
    k_arrived: Any  # [stages]
    v_arrived: Any
    q_freed: Any  # [2]
    k_freed: Any
    v_freed: Any
    turn: Any  # [MIXERS] the mixer may multiply


class _Walk(NamedTuple):
    """One block and head: its tokens, and the keys it walks over, from the last tile to the first.

    Padding walks over one tile, like any block, and its results are multiplied by zero.
    """

    token: jax.Array  # the first
    size: jax.Array  # tokens
    position: jax.Array  # of the first token
    slot: jax.Array  # -1 for padding
    head: jax.Array  # of the queries
    first: jax.Array  # tile of keys
    last: jax.Array  # tile of keys, not seen any more


def _turns(c: _Static, used_ref):
    """How many blocks and heads this program works on."""
    items = used_ref[0] * c.H
    whole = lax.div(items, jnp.int32(c.programs))
    return whole + one_if(_item(c, whole) < items)


def _item(c: _Static, turn):
    """The block and head of this program's `turn`. Every other turn deals them out backwards."""
    program = lax.axis_index("program")
    program = jnp.where(turn & 1 == 1, c.programs - 1 - program, program)
    return turn * c.programs + program


def _load(c: _Static, plan_ref, turn, turns):
    """What the plan says of a turn; after the last turn, of the last turn again."""
    item = _item(c, jnp.minimum(turn, turns - 1))
    entry = lax.div(item, jnp.int32(c.H))
    return (*(plan_ref[entry, i] for i in range(4)), item - entry * c.H)


def _walk(c: _Static, loaded):
    """The block and head, and the tiles of keys they see."""
    token, size, position, slot, head = loaded
    low = jnp.maximum(position + 1 - c.window, 0) if c.window else jnp.int32(0)
    first = jnp.where(slot < 0, 0, lax.div(low, jnp.int32(c.tile)))
    last = jnp.where(slot < 0, 1, lax.div(position + size + (c.tile - 1), jnp.int32(c.tile)))
    return _Walk(token, size, position, slot, head, first, last)


def _places(c: _Static, walk, tile, table_ref) -> tuple[Any, ...]:
    """Where a tile's pages begin among the [P * K * S, D] rows; past the end, the last page."""
    kv_head, row = lax.div(walk.head, jnp.int32(c.H // c.K)), jnp.maximum(walk.slot, 0)
    end = jnp.where(walk.slot < 0, 1, walk.position + walk.size)
    offset = (tile * c.tile) & (c.S - 1) if c.S > c.tile else 0
    places = []
    for piece in range(c.pieces):
        at = jnp.minimum(tile * c.tile + piece * c.run, end - 1)
        page = table_ref[row, lax.shift_right_logical(at, jnp.int32(log2(c.S)))]
        places.append((page * c.K + kv_head) * c.S + offset)
    return tuple(places)


def _copy(c: _Static, source, tiles, barriers, stage, places):
    for piece, where in enumerate(places):
        plgpu.copy_gmem_to_smem(
            source.at[pl.ds(where, c.run)],
            tiles.at[stage, pl.ds(piece * c.run, c.run)],
            barriers.at[stage],
        )


def _copy_queries(c: _Static, m: _Shared, walk, turn, q_ref):
    half = turn & 1
    plgpu.barrier_wait(m.q_freed.at[half])
    for mixer in range(MIXERS):
        for i in range(c.slices):
            tokens = pl.ds(walk.token + mixer * ROWS, ROWS)
            plgpu.copy_gmem_to_smem(
                q_ref.at[tokens, walk.head, pl.ds(i * SLICE, SLICE)],
                m.q_views[1].at[half, mixer, i],
                m.q_arrived.at[half * MIXERS + mixer],
            )


def _fetch(c: _Static, m: _Shared, walk, following, turn, done, count, places, refs):
    """The memory warpgroup's part of one block: keep tiles on their way to the mixers.

    `places` are the first tile's; returns those of the following block's first tile: the places of
    a tile are known one tile before it is copied.
    """
    q_ref, table_ref, k_pages, v_pages = refs

    def turn_of(n, places):
        stage = lax.rem(done + n, jnp.int32(c.stages))
        mine = n + 1 < count
        source = jax.tree.map(lambda a, b: jnp.where(mine, a, b), walk, following)
        tile = jnp.where(mine, walk.last - 2 - n, following.last - 1)
        ahead = _places(c, source, tile, table_ref)
        plgpu.barrier_wait(m.k_freed.at[stage])
        _copy(c, k_pages, m.k_tiles, m.k_arrived, stage, places)
        when(n == 0)(functools.partial(_copy_queries, c, m, walk, turn, q_ref))
        plgpu.barrier_wait(m.v_freed.at[stage])
        _copy(c, v_pages, m.v_tiles, m.v_arrived, stage, places)
        return ahead

    return lax.fori_loop(0, count, turn_of, places)


def _softmax(c: _Static, x, ahead, top, total):
    """Go on with an online softmax: logits f32[ROWS, tile], `ahead` as in _mask, maxima, sums.

    `ahead` None: every token sees the whole tile. Returns the weights, the new maxima and sums, and
    what to shrink older results by. The sums are f32[ROWS, 8], one for every eighth column: they
    are joined at the end.
    """
    unit = c.scale * LOG2E
    if ahead is not None or c.softcap:
        x, unit = cap(x * unit, c.softcap), 1.0
    if ahead is not None:  # scaled before: NOTHING times a unit, fused, is not NOTHING minus itself
        x = _mask(c, x, ahead)
    peak = jnp.maximum(top, x.max(axis=1) * unit)
    shrink = jnp.exp2(top - peak)
    p = jnp.exp2(x * unit - lax.broadcast_in_dim(peak, x.shape, [0]))
    total *= lax.broadcast_in_dim(shrink, total.shape, [0])
    total += functools.reduce(lax.add, [p[:, i : i + EIGHT] for i in range(0, c.tile, EIGHT)])
    return p, peak, total, shrink


def _ahead(c: _Static, walk, mine, n):
    """How far the mixer's first token lies ahead of the first key of the walk's tile n."""
    return walk.position + mine * ROWS - (walk.last - 1 - n) * c.tile


def _mask(c: _Static, x, ahead):
    """Hide the keys that a token does not see: x f32[ROWS, tile].

    By eight columns, those a thread holds two of: their ages differ by a constant.
    """
    iota = functools.partial(plgpu.broadcasted_iota, jnp.int32, (ROWS, EIGHT))
    age = iota(0, layout=plgpu.Layout.WGMMA) - iota(1, layout=plgpu.Layout.WGMMA) + ahead
    parts = []
    for i in range(0, c.tile, EIGHT):
        seen = (age >= i) & (age < i + c.window) if c.window else age >= i
        parts.append(jnp.where(seen, x[:, i : i + EIGHT], NOTHING))
    return lax.concatenate(parts, 1)


class _Softmax(NamedTuple):
    """Of the tile whose values come next."""

    p: jax.Array  # [ROWS, tile] weights, in the dtype of the cache
    top: jax.Array  # f32[ROWS]
    total: jax.Array  # f32[ROWS, 8]


def _fresh(c: _Static):
    """Maxima and sums of nothing."""
    layout = plgpu.Layout.WGMMA
    top = plgpu.layout_cast(jnp.full((ROWS,), NOTHING, jnp.float32), layout.reduce(1))
    return top, plgpu.layout_cast(jnp.zeros((ROWS, EIGHT), jnp.float32), layout)


def _multiply_keys(c: _Static, m: _Shared, x_ref, half, mine, stage):
    for i in range(c.slices):
        keys = m.k_tiles.at[stage, :, pl.ds(i * SLICE, SLICE)]
        plgpu.wgmma(x_ref, m.q_views[0].at[half, mine, i], transposed(keys))


def _begin(c: _Static, m: _Shared, mine, walk) -> _Softmax:
    """The logits and softmax of the first block's first tile."""

    def run(x_ref):
        _multiply_keys(c, m, x_ref, 0, mine, 0)
        plgpu.barrier_arrive(m.turn.at[1 - mine])
        return x_ref[...]

    plgpu.barrier_wait(m.q_arrived.at[mine])
    plgpu.barrier_wait(m.k_arrived.at[0])
    plgpu.barrier_wait(m.turn.at[mine])
    x = pl.run_scoped(run, plgpu.WGMMAAccumulatorRef((ROWS, c.tile), jnp.float32))
    plgpu.barrier_arrive(m.k_freed.at[0])
    p, top, total, _ = _softmax(c, x, _ahead(c, walk, mine, 0), *_fresh(c))
    plgpu.barrier_wait(m.v_arrived.at[0])
    return _Softmax(p.astype(c.dtype), top, total)


def _advance(c: _Static, m: _Shared, mine, acc, soft: _Softmax, half, done, ahead):
    """Add the values of tile `done` - 1, and meanwhile take the softmax of tile `done`.

    Returns the accumulator, the softmax that goes on from `soft`, and what to shrink by.
    """
    p, top, total = soft
    stage, before = (lax.rem(i, jnp.int32(c.stages)) for i in (done, done - 1))
    plgpu.barrier_wait(m.k_arrived.at[stage])
    plgpu.barrier_wait(m.turn.at[mine])

    def run(x_ref):  # made first: its zeros must not come between the products
        weights = plgpu.layout_cast(jnp.zeros(p.shape, jnp.float32), plgpu.Layout.WGMMA)
        state = (plgpu.WGMMAAccumulatorRef.init(acc), weights, top, total, top)
        return pl.run_state(functools.partial(both, x_ref))(state)

    def both(x_ref, refs):
        acc_ref, *after_refs = refs
        _multiply_keys(c, m, x_ref, half, mine, stage)
        plgpu.wgmma(acc_ref, p, m.v_tiles.at[before])
        plgpu.barrier_arrive(m.turn.at[1 - mine])
        x = plgpu.wgmma_accumulator_load(x_ref, wait_n=1)
        plgpu.barrier_arrive(m.k_freed.at[stage])
        after = lax.optimization_barrier(_softmax(c, x, ahead, top, total))
        plgpu.barrier_wait(m.v_arrived.at[stage])  # here it keeps the softmax before the next wait
        for ref, value in zip(after_refs, after, strict=True):
            ref[...] = value

    accumulator = plgpu.WGMMAAccumulatorRef((ROWS, c.tile), jnp.float32)
    after, weights, peak, sums, shrink = pl.run_scoped(run, accumulator)
    # The products read p until here: only now may the next weights take its registers.
    after, weights, shrink = lax.optimization_barrier((after, weights, shrink))
    plgpu.barrier_arrive(m.v_freed.at[before])
    return after, _Softmax(weights.astype(c.dtype), peak, sums), shrink


def _last_values(c: _Static, m: _Shared, mine, acc, p, done):
    """Add the values of the last tile, `done` - 1, with nothing to multiply beside them."""
    before = lax.rem(done - 1, jnp.int32(c.stages))
    plgpu.barrier_wait(m.turn.at[mine])

    def add(acc_ref):
        plgpu.wgmma(acc_ref, p, m.v_tiles.at[before])
        plgpu.barrier_arrive(m.turn.at[1 - mine])

    return pl.run_state(add)(plgpu.WGMMAAccumulatorRef.init(acc))


def _mix(c: _Static, m: _Shared, mine, walk, following, turn, done, soft: _Softmax, sinks_ref):
    """One mixer, one block whose first tile has its softmax: all its values, f32[ROWS, D].

    Goes on until the softmax of the following block's first tile, which it returns too. `following`
    None: there is none.
    """
    at, count, half = walk.position + mine * ROWS, walk.last - walk.first, turn & 1

    def step(n, carry, masked):
        acc, soft = carry
        ahead = _ahead(c, walk, mine, n) if masked else None
        acc, soft, shrink = _advance(c, m, mine, acc, soft, half, done + n, ahead)
        return acc * lax.broadcast_in_dim(shrink, acc.shape, [0]), soft

    whole = lax.div(at + 1, jnp.int32(c.tile))  # tiles before it lie under the diagonal
    plain = jnp.clip(walk.last - whole, 1, count)
    edge = count
    if c.window:
        low = lax.div(jnp.maximum(at + ROWS - c.window, 0) + c.tile - 1, jnp.int32(c.tile))
        edge = jnp.clip(walk.last - low, plain, count)
    acc = plgpu.layout_cast(jnp.zeros((ROWS, c.D), jnp.float32), plgpu.Layout.WGMMA)
    carry = lax.fori_loop(1, plain, functools.partial(step, masked=True), (acc, soft))
    carry = lax.fori_loop(plain, edge, functools.partial(step, masked=False), carry)
    if c.window:
        carry = lax.fori_loop(edge, count, functools.partial(step, masked=True), carry)
    acc, soft = carry
    total = soft.total
    if c.sinks:  # an eighth in each column; much larger than all logits it makes the result 0
        sink = jnp.exp2(sinks_ref[walk.head] * LOG2E - soft.top) * (1 / EIGHT)
        total += lax.broadcast_in_dim(sink, total.shape, [0])
    plgpu.barrier_arrive(m.q_freed.at[half])
    if following is None:
        acc = _last_values(c, m, mine, acc, soft.p, done + count)
    else:
        plgpu.barrier_wait(m.q_arrived.at[(1 - half) * MIXERS + mine])
        ahead = _ahead(c, following, mine, 0)
        soft = _Softmax(soft.p, *_fresh(c))
        acc, soft, _ = _advance(c, m, mine, acc, soft, 1 - half, done + count, ahead)
    part = jnp.where(walk.slot < 0, 0.0, 1 / jnp.maximum(total.sum(axis=1), 1e-30))
    return acc * lax.broadcast_in_dim(part, acc.shape, [0]), soft


def _store(c: _Static, y, walk, mine, y_tile, y_ref):
    """Write the rows that are tokens of this block: as few copies as their number has bits."""
    plgpu.wait_smem_to_gmem(0)  # the block before has left y_tile
    put(y_tile, y.astype(c.dtype))
    plgpu.commit_smem()
    count = jnp.clip(walk.size - mine * ROWS, 0, ROWS)
    for bit in range(log2(ROWS), -1, -1):
        length = 1 << bit

        @when(count & length != 0)
        def _(length=length):
            begin = count & -2 * length  # after what the larger copies took
            where = walk.token + mine * ROWS + begin
            plgpu.copy_smem_to_gmem(
                y_tile.at[pl.ds(begin, length)], y_ref.at[pl.ds(where, length), walk.head]
            )


def _kernel(c: _Static, plan_ref, used_ref, table_ref, q_ref, k_pages, v_pages, *refs):
    sinks_ref = refs[0] if c.sinks else None
    y_ref, *scratch = refs[1:] if c.sinks else refs
    m = _Shared(*scratch)
    mine = lax.axis_index("warpgroup")
    turns = _turns(c, used_ref)
    load = functools.partial(_load, c, plan_ref, turns=turns)

    @when((mine < MIXERS) & (turns > 0))
    def _():
        plgpu.set_max_registers(232, action="increase")
        for barriers, n in ((m.q_freed, 2), (m.k_freed, c.stages), (m.v_freed, c.stages)):
            for i in range(n):
                plgpu.barrier_arrive(barriers.at[i])
        when(mine == 1)(lambda: plgpu.barrier_arrive(m.turn.at[0]))

        def work(turn, carry, final=False):
            done, loaded, next_loaded, soft = carry
            walk, following = _walk(c, loaded), None if final else _walk(c, next_loaded)
            y, soft = _mix(c, m, mine, walk, following, turn, done, soft, sinks_ref)
            ahead = load(turn + 2)  # arrives behind the store
            _store(c, y, walk, mine, m.y_tiles.at[mine], y_ref)
            return done + (walk.last - walk.first), next_loaded, ahead, soft

        loaded, next_loaded = load(0), load(1)
        soft = _begin(c, m, mine, _walk(c, loaded))
        carry = (jnp.int32(0), loaded, next_loaded, soft)
        carry = lax.fori_loop(0, turns - 1, work, carry)
        work(turns - 1, carry, final=True)
        plgpu.wait_smem_to_gmem(0)

    @when((mine == MIXERS) & (turns > 0))
    def _():
        plgpu.set_max_registers(40, action="decrease")
        _supply(c, m, load, turns, (q_ref, table_ref, k_pages, v_pages))


def _supply(c: _Static, m: _Shared, load, turns, refs):
    """The memory warpgroup: all blocks."""

    def work(turn, carry):
        done, loaded, places = carry
        walk, next_loaded = _walk(c, loaded), load(turn + 1)
        count = walk.last - walk.first
        places = _fetch(c, m, walk, _walk(c, next_loaded), turn, done, count, places, refs)
        return done + count, next_loaded, places

    loaded = load(0)
    walk = _walk(c, loaded)
    places = _places(c, walk, walk.last - 1, refs[1])
    lax.fori_loop(0, turns, work, (jnp.int32(0), loaded, places))


def longest_first(plan: jax.Array, window: int) -> tuple[jax.Array, jax.Array]:
    """The plan's entries by the keys they see, unused ones last; and how many are used, i32[1]."""
    _, size, position, slot = plan.T
    keys = jnp.where(slot < 0, 0, position + size)
    if window:
        keys = jnp.minimum(keys, window + size)
    keys = jnp.where(size > 0, keys, -1)
    entry = jnp.arange(keys.shape[0])
    before = (keys[None, :] > keys[:, None]) | (
        (keys[None, :] == keys[:, None]) & (entry[None, :] < entry[:, None])
    )
    rank = jnp.sum(before, axis=1)
    order = jnp.sum(jnp.where(rank[None, :] == entry[:, None], entry[None, :], 0), axis=1)
    return plan[order], jnp.sum(size > 0, dtype=jnp.int32)[None]


def _scratch(c: _Static) -> _Shared:
    """The shared memory and barriers to ask for."""
    # One place in two forms: the copy engine counts the rows of a tiled form in tiles of 8.
    q_views = [
        plgpu.SMEM((2, MIXERS, c.slices, ROWS, SLICE), c.dtype, transforms=transforms)
        for transforms in (tiled(), tiled()[1:])
    ]
    pages = plgpu.SMEM((c.stages, c.tile, c.D), c.dtype, transforms=tiled())
    arrived = plgpu.Barrier(num_arrivals=c.pieces, num_barriers=c.stages)
    freed = plgpu.Barrier(num_arrivals=MIXERS, num_barriers=c.stages)
    return _Shared(
        q_views=plgpu.RefUnion(*q_views),
        y_tiles=plgpu.SMEM((MIXERS, ROWS, c.D), c.dtype),
        k_tiles=pages,
        v_tiles=pages,
        q_arrived=plgpu.Barrier(num_arrivals=c.slices, num_barriers=2 * MIXERS),
        k_arrived=arrived,
        v_arrived=arrived,
        q_freed=plgpu.Barrier(num_arrivals=MIXERS, num_barriers=2),
        k_freed=freed,
        v_freed=freed,
        turn=plgpu.Barrier(num_barriers=MIXERS),
    )


def prefill_hopper(
    q: jax.Array,
    y: jax.Array,
    cache: KV,
    batch: RaggedBatch,
    *,
    window: int = 0,
    scale: float,
    softcap: float = 0.0,
    sinks: jax.Array | None = None,
    tuning: HopperTuning = HOPPER,
    interpret: Any = None,
) -> jax.Array:
    """Attend the chunks' tokens, whose keys are in their pages: q, y [N, H, D] -> y [N, H, D].

    The rows' part of y is kept, the chunks' part replaced; padding tokens become zeros. All pages
    must hold finite numbers: what lies past a sequence's end is multiplied by zero. sinks f32[H] as
    in reference.py.
    """
    (N, H, D), (P, K, S, _) = q.shape, cache.k.shape
    base = batch.table.shape[0] * batch.tokens_per_row
    plan, used = longest_first(plan_prefill(batch, N - base, BLOCK, base=base), window)
    c = _Static(
        H=H, K=K, S=S, D=D, tile=tuning.tile, run=min(S, tuning.tile), stages=tuning.stages,
        programs=min(PROGRAMS, plan.shape[0] * H), window=window, scale=scale, softcap=softcap,
        dtype=q.dtype, sinks=sinks is not None,
    )  # fmt: skip
    pages = (cache.k.reshape(P * K * S, D), cache.v.reshape(P * K * S, D))
    y_ref = jax.new_ref(y)
    plgpu.kernel(
        functools.partial(_kernel, c),
        out_type=(),
        scratch_types=_scratch(c),
        grid=(c.programs,),
        grid_names=("program",),
        num_threads=MIXERS + 1,
        thread_name="warpgroup",
        kernel_name="paged_prefill_hopper",
        compiler_params=compiler_params(),
        interpret=interpret,
    )(plan, used, batch.table, q, *pages, *(() if sinks is None else (sinks,)), y_ref)
    return jax.freeze(y_ref)
