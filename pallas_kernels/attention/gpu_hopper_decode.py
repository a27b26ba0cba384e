"""Paged decode attention for Hopper (Pallas, Mosaic GPU): pages through the copy engine.

    y[r, h] = sum_t softmax_t(scale * q[r, h] . k[t, h // G]) v[t, h // G]      t < row_start[r] + 1

The parts are those of gpu_decode.py, the longest first. Every multiprocessor keeps one program,
which takes its share of the (part, key-value head) pairs one after another. Three warpgroups:

    memory  | queries of a part, its new token, k tile, v tile of 64 tokens, up to `tiles` of them
            | ahead for each mixer, on into the next part and the next row
    mixer 0 | of every other part: k.q of a tile, softmax, v.p, ...; at its end its result
    mixer 1 | of the others

so that the memory never rests between rows: that is what the kernel is for. One mixer would do for
the products, but not for the waits of one after the other. Products are transposed, tokens by
heads: a wgmma has 64 rows, of which a group of heads would leave most empty. Of a row's last part
the first tile is the new token alone, which comes from the step's own keys and values; the mixer
stores it in its page at the end.

Copies count rows in eights, so a part's queries come with their neighbours, 8 heads from a multiple
of 8 on, and a new key with those of the other heads. Of a part's last tile only 16 tokens at a time
are copied, as far as they are needed: what lies behind in shared memory is masked, and finite.

Shared memory per program: 2 * tiles * 2 * 64 * D * 2 bytes, and what `_room` counts besides.
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
from octavo.pallas_kernels.attention.gpu_decode import (
    EIGHT,
    LOG2E,
    NOTHING,
    DecodePlan,
    cap,
    log2,
    merge,
    plan_decode,
    together,
)
from octavo.pallas_kernels.attention.reference import KV
from octavo.pallas_kernels.mosaic import (
    PROGRAMS,
    compiler_params,
    one_if,
    over_warps,
    over_warps_scratch,
    put,
    tiled,
    transposed,
    when,
    writes_through_references,
)

TILE = 64  # tokens
MIXERS = 2  # each with queries, stages and results of its own
SHARED = 224 * 1024  # bytes of a program; barriers and what Pallas adds take some of the 227 KiB


@dataclass(frozen=True)
class HopperDecodeTuning:
    """How the kernel is built, and when it is taken."""

    tiles: int = 3  # of keys and of values on their way to a mixer, if shared memory has room
    pairs: int = 528  # of a part and a head, to cut a batch into: some for each program
    programs: int = PROGRAMS  # fewer only to test how one goes from part to part
    least_rows: int = 129  # from which it is taken: gpu_decode.py norms and turns those of fewer


HOPPER_DECODE = HopperDecodeTuning()


@dataclass(frozen=True)
class _Static:
    """What is known when the kernel is built."""

    R: int
    H: int
    K: int
    S: int
    D: int
    stages: int
    programs: int
    most: int  # parts
    scale: float
    softcap: float
    dtype: Any
    interpret: bool

    @property
    def G(self) -> int:
        return self.H // self.K

    @property
    def group(self) -> int:
        """Heads that are copied together."""
        return together(self.G)


class _Shared(NamedTuple):
    """Shared memory and barriers of a program."""

    q_tiles: Any  # [MIXERS, group, D]
    k_tiles: Any  # [MIXERS * stages, TILE, D]
    v_tiles: Any
    p_tiles: Any  # [MIXERS, group, TILE]
    y_tiles: Any  # [MIXERS, G, D]
    acc_tiles: Any  # f32[MIXERS, G, D]
    sums: Any  # f32[MIXERS, 2, group] maxima, sums
    scratch: Any  # f32[MIXERS, ...] for what warps tell each other
    q_arrived: Any  # [MIXERS]
    k_arrived: Any  # [MIXERS * stages]
    v_arrived: Any
    q_freed: Any  # [MIXERS]
    k_freed: Any  # [MIXERS * stages]
    v_freed: Any


class _Inputs(NamedTuple):
    parts: Any  # i32[W, 6]
    used: Any  # i32[1] parts
    table: Any  # i32[R, M]
    dest: Any  # i32[N]
    q: Any  # [N * H, D]
    k: Any  # [N * K, D]
    v: Any
    k_pages: Any  # [P * K * S, D]
    v_pages: Any


class _Part(NamedTuple):
    """One part and head, and its walk over tiles."""

    part: Any
    row: Any
    low: Any  # the first token
    high: Any  # not seen any more
    kind: Any  # bits: 1 with the new token, 2 the only part
    head: Any  # of keys and values
    page: Any  # of the first cached tile
    first: Any  # cached tile
    own: Any  # 1 with a tile of the new token, which comes before the cached ones, else 0
    tiles: Any  # of both kinds


def why_not_hopper_decode(
    q: jax.Array, k_pages: jax.Array, batch: RaggedBatch, given: tuple[Any, Any] = (None, None)
) -> str | None:
    """The reason this kernel refuses what gpu_decode.py takes, or None if it takes it too.

    given: sinks and scales of the cache.
    """
    P, K, S, D = k_pages.shape
    H = q.shape[1]
    if not writes_through_references():
        return f"jax {jax.__version__} is older than 0.11"
    if D != 128 or S % TILE:
        return f"D={D} is not 128, or pages of {S} tokens are not in multiples of {TILE}"
    if q.dtype not in (jnp.bfloat16, jnp.float16) or q.dtype != k_pages.dtype:
        return f"queries are {q.dtype} and the cache is {k_pages.dtype}: 16 bits are needed"
    if H % EIGHT or H // K not in (1, 2, 4, 8, 16, 32, 64) or (q.shape[0] * K) % EIGHT:
        return f"H={H} and K={K} heads of {q.shape[0]} tokens are not in eights"
    if _room(H // K, D) < 1:
        return f"{H // K} heads a group leave no room for a tile in shared memory"
    if any(x is not None for x in given):
        return "sinks and scales of the cache are left to gpu_decode.py"
    return None


def by_length(parts: jax.Array, table: jax.Array, page_size: int) -> jax.Array:
    """parts i32[W, 4] of a plan, table i32[R, M] -> i32[W, 6], those of most tiles first, each with
    its number and its first page.

    Every part is compared with every other: W is some hundreds, and a sort takes many kernels.
    """
    row, low, high, kind = (parts[:, n] for n in range(4))
    tiles = jnp.where(row < table.shape[0], pl.cdiv(high - low, TILE) + (kind & 1), -1)
    number = jnp.arange(parts.shape[0], dtype=jnp.int32)
    before = (tiles[None] > tiles[:, None]) | (
        (tiles[None] == tiles[:, None]) & (number[None] < number[:, None])
    )
    place = jnp.sum(before, axis=1, dtype=jnp.int32)
    page = table.at[row, low // page_size].get(mode="clip")
    whole = jnp.concatenate([parts, number[:, None], page[:, None]], axis=1)
    return jnp.zeros_like(whole).at[place].set(whole, unique_indices=True)


def _seat(c: _Static, turn):
    """This program's place among those of a turn: every other one is dealt backwards."""
    mine = lax.axis_index("program")
    return jnp.where(turn & 1 == 1, c.programs - 1 - mine, mine)


def _turns(c: _Static, used_ref):
    """How many pairs this program works on."""
    items = used_ref[0] * c.K
    whole = lax.div(items, jnp.int32(c.programs))
    return whole + one_if(_seat(c, whole) < items - whole * c.programs)


def _load(c: _Static, i: _Inputs, turn) -> _Part:
    """What the plan says of a turn; behind the last one, of anything."""
    item = jnp.minimum(turn * c.programs + _seat(c, turn), c.most * c.K - 1)
    place = lax.div(item, jnp.int32(c.K))
    row, low, high, kind, number, page = (i.parts[place, n] for n in range(6))
    first = lax.div(low, jnp.int32(TILE))
    cached = jnp.where(high > low, lax.div(high + (TILE - 1), jnp.int32(TILE)) - first, 0)
    own = kind & 1
    head = item - place * c.K
    return _Part(number, row, low, high, kind, head, page, first, own, cached + own)


def _stage(c: _Static, mixer, count):
    """Where a mixer's tile lies that `count` of its own came before."""
    return mixer * c.stages + lax.rem(count, jnp.int32(c.stages))


def _aligned(place):
    """The multiple of 8 that a copy begins at, and how far behind it `place` is."""
    begin = pl.multiple_of(place & ~(EIGHT - 1), EIGHT)
    return begin, place - begin


def _supply(c: _Static, m: _Shared, i: _Inputs, turns):
    """The memory warpgroup: all parts."""

    def copy(source, begin, rows, target, at, barrier):
        plgpu.copy_gmem_to_smem(source.at[pl.ds(begin, rows)], target.at[pl.ds(at, rows)], barrier)

    def fetch(part: _Part, n, page, pages, target, barrier):
        """A cached tile of keys or values; two arrivals, whatever is copied."""
        begin = (part.first + n) * TILE
        where = (page * c.K + part.head) * c.S + (begin & (c.S - 1))
        left = part.high - begin

        @when(left > 48)
        def _():
            copy(pages, where, TILE, target, 0, barrier)
            plgpu.barrier_arrive(barrier)

        @when(left <= 48)
        def _():
            half = left > 16

            @when(half)
            def _():
                copy(pages, where, 32, target, 0, barrier)

            @when((left > 32) | jnp.logical_not(half))
            def _():
                at = jnp.where(half, 32, 0)
                copy(pages, where + at, 16, target, pl.multiple_of(at, 16), barrier)

            @when(jnp.logical_not(half) | (left <= 32))
            def _():
                plgpu.barrier_arrive(barrier)

    def fetch_own(part: _Part, new, target, barrier):
        """The new key or value, among its neighbours."""
        copy(new, _aligned(part.row * c.K + part.head)[0], EIGHT, target, 0, barrier)
        plgpu.barrier_arrive(barrier)

    def one(turn, carry):
        done, other, part = carry
        following, mixer = _load(c, i, turn + 1), turn & 1
        plgpu.barrier_wait(m.q_freed.at[mixer])
        heads = _aligned(part.row * c.H + part.head * c.G)[0]
        copy(i.q, heads, c.group, m.q_tiles.at[mixer], 0, m.q_arrived.at[mixer])

        @when(part.own == 1)
        def _():
            stage = _stage(c, mixer, done)
            plgpu.barrier_wait(m.k_freed.at[stage])
            fetch_own(part, i.k, m.k_tiles.at[stage], m.k_arrived.at[stage])
            plgpu.barrier_wait(m.v_freed.at[stage])
            fetch_own(part, i.v, m.v_tiles.at[stage], m.v_arrived.at[stage])

        def tile(n, page):
            stage = _stage(c, mixer, done + part.own + n)
            after = jnp.clip((part.first + n + 1) * TILE, 0, jnp.maximum(part.high - 1, 0))
            ahead = i.table[part.row, lax.shift_right_logical(after, jnp.int32(log2(c.S)))]
            plgpu.barrier_wait(m.k_freed.at[stage])
            fetch(part, n, page, i.k_pages, m.k_tiles.at[stage], m.k_arrived.at[stage])
            plgpu.barrier_wait(m.v_freed.at[stage])
            fetch(part, n, page, i.v_pages, m.v_tiles.at[stage], m.v_arrived.at[stage])
            return ahead  # arrived while others were waited for

        lax.fori_loop(0, part.tiles - part.own, tile, part.page)
        return other, done + part.tiles, following  # the other mixer's turn

    lax.fori_loop(0, turns, one, (jnp.int32(0), jnp.int32(0), _load(c, i, jnp.int32(0))))
    for stage in range(MIXERS * c.stages):  # what is freed last is waited for, too
        plgpu.barrier_wait(m.k_freed.at[stage])
        plgpu.barrier_wait(m.v_freed.at[stage])
    for mixer in range(MIXERS):
        plgpu.barrier_wait(m.q_freed.at[mixer])


def _load_new(c: _Static, i: _Inputs, part: _Part):
    """The row's new key and value, [D] each, and their place."""
    load: Any = plgpu.load  # jax 0.11 has an index more, which may be left out
    layout = plgpu.Layout.WG_STRIDED((c.D,), vec_size=1)
    new = [load(x.at[part.row * c.K + part.head], layout=layout) for x in (i.k, i.v)]
    dest = i.dest[part.row]
    page = lax.shift_right_logical(dest, jnp.int32(log2(c.S)))
    return new, (page * c.K + part.head) * c.S + (dest & (c.S - 1))


def _mask(c: _Static, part: _Part, n, x):
    """Hide what is not the part's: x f32[TILE, group]."""
    own = n < part.own
    begin = (part.first + n - part.own) * TILE
    new = _aligned(part.row * c.K + part.head)[1]
    low = jnp.where(own, new, part.low - begin)
    high = jnp.where(own, new + 1, part.high - begin)
    token = plgpu.broadcasted_iota(jnp.int32, x.shape, 0, layout=plgpu.Layout.WGMMA)
    return jnp.where((token >= low) & (token < high), x, NOTHING)


def _attend(c: _Static, m: _Shared, part: _Part, mixer, done):
    """One part: (accumulator f32[D, group], maxima and sums f32[group])."""
    over = functools.partial(over_warps, scratch=m.scratch.at[mixer], interpret=c.interpret)

    def tile(n, carry):
        acc, top, total = carry
        stage = _stage(c, mixer, done + n)

        def logits(x_ref):
            plgpu.wgmma(x_ref, m.k_tiles.at[stage], transposed(m.q_tiles.at[mixer]))
            return x_ref[...]

        def values(y_ref):
            plgpu.wgmma(y_ref, transposed(m.v_tiles.at[stage]), transposed(m.p_tiles.at[mixer]))
            return y_ref[...]

        plgpu.barrier_wait(m.k_arrived.at[stage])
        x = pl.run_scoped(logits, plgpu.WGMMAAccumulatorRef((TILE, c.group), jnp.float32))
        plgpu.barrier_arrive(m.k_freed.at[stage])
        x = _mask(c, part, n, cap(x * (c.scale * LOG2E), c.softcap))
        peak = jnp.maximum(top, over("max", x))
        p = jnp.exp2(x - lax.broadcast_in_dim(peak, x.shape, [1]))
        shrink = jnp.exp2(top - peak)
        weights = plgpu.layout_cast(p.astype(c.dtype), plgpu.Layout.WGMMA_TRANSPOSED)
        transposed(m.p_tiles.at[mixer])[...] = weights
        plgpu.commit_smem()
        plgpu.barrier_wait(m.v_arrived.at[stage])
        more = pl.run_scoped(values, plgpu.WGMMAAccumulatorRef((c.D, c.group), jnp.float32))
        plgpu.barrier_arrive(m.v_freed.at[stage])
        acc = acc * lax.broadcast_in_dim(shrink, acc.shape, [1]) + more
        return acc, peak, total * lax.broadcast_in_dim(shrink, x.shape, [1]) + p

    layout = plgpu.Layout.WGMMA
    acc, total = (
        plgpu.layout_cast(jnp.zeros((n, c.group), jnp.float32), layout) for n in (c.D, TILE)
    )
    top = plgpu.layout_cast(jnp.full((c.group,), NOTHING, jnp.float32), layout.reduce(0))
    acc, top, total = lax.fori_loop(0, part.tiles, tile, (acc, top, total))
    return acc, top, over("add", total)


def _finish(c: _Static, m: _Shared, mixer, part: _Part, result, outputs):
    """Write a whole row's result, or what the merge needs of a part."""
    y_ref, acc_ref, max_ref, sum_ref = outputs
    acc, top, total = result
    heads = part.head * c.G
    first = _aligned(part.row * c.H + heads)[1]  # of the columns, G count from here on
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the part before has left

    def turn(x, tile):
        """The columns that count become rows, one by one."""
        column = plgpu.broadcasted_iota(jnp.int32, x.shape, 1, layout=plgpu.Layout.WGMMA)

        def one(g, _):
            put(tile.at[g], jnp.where(column == first + g, x, 0.0).sum(axis=1).astype(tile.dtype))

        lax.fori_loop(0, c.G, one, None)
        plgpu.commit_smem()

    @when(part.kind >= 2)
    def _():
        y = acc * lax.broadcast_in_dim(1 / total, acc.shape, [1])
        turn(y, m.y_tiles.at[mixer])
        plgpu.copy_smem_to_gmem(m.y_tiles.at[mixer], y_ref.at[part.row, pl.ds(heads, c.G)])

    @when(part.kind < 2)
    def _():
        put(m.sums.at[mixer, 0], top)
        put(m.sums.at[mixer, 1], total)
        turn(acc, m.acc_tiles.at[mixer])
        plgpu.copy_smem_to_gmem(m.acc_tiles.at[mixer], acc_ref.at[part.part, pl.ds(heads, c.G)])
        for n, target in enumerate((max_ref, sum_ref)):
            plgpu.copy_smem_to_gmem(m.sums.at[mixer, n], target.at[part.part, part.head])


def _mix(c: _Static, m: _Shared, i: _Inputs, mixer, turns, outputs):
    """A mixer: every other part."""

    def one(n, carry):
        done, part = carry
        following = _load(c, i, MIXERS * (n + 1) + mixer)
        (key, value), where = _load_new(c, i, part)
        plgpu.barrier_wait(m.q_arrived.at[mixer])
        result = _attend(c, m, part, mixer, done)
        plgpu.barrier_arrive(m.q_freed.at[mixer])

        @when(part.own == 1)
        def _():  # only now: the copy engine has read the page
            i.k_pages[where] = key
            i.v_pages[where] = value

        _finish(c, m, mixer, part, result, outputs)
        return done + part.tiles, following

    part = _load(c, i, mixer)
    mine = [mixer * c.stages + n for n in range(c.stages)]
    plgpu.barrier_arrive(m.q_freed.at[mixer])
    for stage in mine:
        plgpu.barrier_arrive(m.k_freed.at[stage])
    nothing = plgpu.layout_cast(jnp.zeros((TILE, c.D), c.dtype), plgpu.Layout.WGMMA)
    for stage in mine:  # a weight of 0 times what was never written must be 0
        m.v_tiles[stage] = nothing
        plgpu.commit_smem()
        plgpu.barrier_arrive(m.v_freed.at[stage])
    own = lax.div(turns + (MIXERS - 1 - mixer), jnp.int32(MIXERS))
    lax.fori_loop(0, own, one, (jnp.int32(0), part))
    plgpu.wait_smem_to_gmem(0)


def _kernel(c: _Static, *refs):
    i, outputs, m = _Inputs(*refs[:9]), refs[9:13], _Shared(*refs[13:])
    turns = _turns(c, i.used)
    mine = lax.axis_index("warpgroup")

    @when((mine < MIXERS) & (turns > 0))
    def _():
        plgpu.set_max_registers(208, action="increase")
        _mix(c, m, i, mine, turns, outputs)

    @when((mine == MIXERS) & (turns > 0))
    def _():
        plgpu.set_max_registers(64, action="decrease")
        _supply(c, m, i, turns)


def _scratch(c: _Static) -> _Shared:
    """The shared memory and barriers to ask for."""
    shared = functools.partial(plgpu.SMEM, dtype=c.dtype, transforms=tiled())
    stages = MIXERS * c.stages
    arrived = plgpu.Barrier(num_arrivals=2, num_barriers=stages)
    freed = plgpu.Barrier(num_barriers=stages)
    return _Shared(
        q_tiles=shared((MIXERS, c.group, c.D)),
        k_tiles=shared((stages, TILE, c.D)),
        v_tiles=shared((stages, TILE, c.D)),
        p_tiles=shared((MIXERS, c.group, TILE)),
        y_tiles=plgpu.SMEM((MIXERS, c.G, c.D), c.dtype),
        acc_tiles=plgpu.SMEM((MIXERS, c.G, c.D), jnp.float32),
        sums=plgpu.SMEM((MIXERS, 2, c.group), jnp.float32),
        scratch=plgpu.SMEM((MIXERS, over_warps_scratch(c.group)), jnp.float32),
        q_arrived=plgpu.Barrier(num_barriers=MIXERS),
        k_arrived=arrived,
        v_arrived=arrived,
        q_freed=plgpu.Barrier(num_barriers=MIXERS),
        k_freed=freed,
        v_freed=freed,
    )


def _room(G: int, D: int) -> int:
    """How many tiles of keys and of values a mixer can have."""
    group = together(G)
    q, p, y, acc = group * D * 2, group * TILE * 2, G * D * 2, G * D * 4
    fixed = q + p + y + acc + 2 * group * 4 + over_warps_scratch(group) * 4
    return (SHARED // MIXERS - fixed) // (2 * TILE * D * 2)


def decode_hopper(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cache: KV,
    batch: RaggedBatch,
    *,
    merged: int,
    **static: Any,
) -> tuple[jax.Array, KV]:
    """What `gpu_decode.decode` does; static: as `parts_hopper` has them. All pages must hold finite
    numbers."""
    plan, results, cache = parts_hopper(q, k, v, cache, batch, **static)
    return merge(plan, results, merged, interpret=False), cache


def parts_hopper(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cache: KV,
    batch: RaggedBatch,
    *,
    window: int = 0,
    scale: float,
    softcap: float = 0.0,
    tuning: HopperDecodeTuning = HOPPER_DECODE,
    interpret: Any = None,
) -> tuple[DecodePlan, tuple[jax.Array, ...], KV]:
    """Write the rows' new tokens and attend, up to the merge of rows of several parts.

    Returns the plan; (y [N, H, D], of each part acc f32[W, H, D], maxima and sums
    f32[W, K, max(8, G)], head h at [h // G, h % max(8, G)]); and the cache. y has the rows of one
    part only. All pages must hold finite numbers.
    """
    (N, H, D), (P, K, S, _), R = q.shape, cache.k.shape, batch.table.shape[0]
    plan = plan_decode(batch, window=window, tile=TILE, target=max(1, tuning.pairs // K))
    W = plan.parts.shape[0]
    used = jnp.sum(plan.rows[:, 1], dtype=jnp.int32)[None]
    programs = min(tuning.programs, W * K)
    stages = min(tuning.tiles, _room(H // K, D))
    how = (stages, programs, W, scale, softcap, q.dtype, interpret is not None)
    c = _Static(R, H, K, S, D, *how)
    k_ref, v_ref = (jax.new_ref(x.reshape(P * K * S, D)) for x in (cache.k, cache.v))
    f32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    results = plgpu.kernel(
        functools.partial(_kernel, c),
        out_type=(
            jax.ShapeDtypeStruct((N, H, D), q.dtype),
            f32((W, H, D)), f32((W, K, c.group)), f32((W, K, c.group)),
        ),
        scratch_types=_scratch(c),
        grid=(c.programs,),
        grid_names=("program",),
        num_threads=MIXERS + 1,
        thread_name="warpgroup",
        kernel_name="paged_decode_hopper",
        compiler_params=compiler_params(),
        interpret=interpret,
    )(
        by_length(plan.parts, batch.table, S), used, batch.table, batch.dest, q.reshape(N * H, D),
        *(x.reshape(-1, D) for x in (k, v)), k_ref, v_ref,
    )  # fmt: skip
    pages = (jax.freeze(ref).reshape(P, K, S, D) for ref in (k_ref, v_ref))
    return plan, tuple(results), KV(*pages)
