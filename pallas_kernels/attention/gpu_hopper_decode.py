"""Paged decode attention for Hopper (Pallas, Mosaic GPU): pages through the copy engine.

    y[r, h] = sum_t softmax_t(scale * q[r, h] . k[t, h // G]) v[t, h // G]      t < row_start[r] + 1

The parts are those of gpu_decode.py. Every multiprocessor keeps one program, which takes its share
of the (part, key-value head) pairs one after another. Two warpgroups:

    memory | k tile, v tile of 64 tokens, `stages` ahead, on into the next part and the next row
    mixer  | q.k of a tile, softmax, p.v, ...; at a part's end its result

so that the memory never rests between rows: that is what the kernel is for. A product takes 64 rows
of queries, of which G count; the tensor cores have time for that. A row's last part has one more
tile with the new token alone, which comes from the step's own keys and values; the mixer stores it
in its page afterwards.

Copies count rows in eights, so a part's queries come with their neighbours, 8 heads from a multiple
of 8 on, and a new key with those of the other heads. Of a part's last tile only 16 tokens at a time
are copied, as far as they are needed: what lies behind in shared memory is masked, and finite.

Shared memory per program: (2 * 64 + 2 * 64 * stages + 3 * 64) * D * 2 + 64 * 64 * 2 bytes.
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
    put,
    tiled,
    transposed,
    writes_through_references,
)

ROWS = 64  # the M of a wgmma
TILE = 64  # tokens


@dataclass(frozen=True)
class HopperDecodeTuning:
    """How the kernel is built, and when it is taken."""

    tiles: int = 3  # of keys and of values on their way
    pairs: int = 528  # of a part and a head, to cut a batch into: some for each program
    programs: int = PROGRAMS  # fewer only to test how one goes from part to part
    least_rows: int = 1 << 30  # from which it is taken: not yet, it has not been measured


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
    scale: float
    softcap: float
    dtype: Any

    @property
    def G(self) -> int:
        return self.H // self.K

    @property
    def group(self) -> int:
        """Heads that are copied together."""
        return together(self.G)


class _Shared(NamedTuple):
    """Shared memory and barriers of a program."""

    q_tiles: Any  # [2, ROWS, D]
    k_tiles: Any  # [stages, TILE, D]
    v_tiles: Any
    p_tile: Any  # [ROWS, TILE]
    y_tile: Any  # [ROWS, D]
    acc_tile: Any  # f32[ROWS, D]
    sums: Any  # f32[2, ROWS] maxima, sums
    q_arrived: Any  # [2]
    k_arrived: Any  # [stages]
    v_arrived: Any
    q_freed: Any  # [2]
    k_freed: Any  # [stages]
    v_freed: Any


class _Inputs(NamedTuple):
    parts: Any  # i32[W, 4]
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
    first: Any  # tile
    cached: Any  # tiles before the new token's


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
    if any(x is not None for x in given):
        return "sinks and scales of the cache are left to gpu_decode.py"
    return None


def _turns(c: _Static, used_ref):
    """How many pairs this program works on."""
    items = used_ref[0] * c.K
    return lax.div(items - lax.axis_index("program") + (c.programs - 1), jnp.int32(c.programs))


def _load(c: _Static, i: _Inputs, turn, turns) -> _Part:
    """What the plan says of a turn; after the last turn, of the last turn again."""
    item = jnp.minimum(turn, turns - 1) * c.programs + lax.axis_index("program")
    part = lax.div(item, jnp.int32(c.K))
    row, low, high, kind = (i.parts[part, n] for n in range(4))
    first = lax.div(low, jnp.int32(TILE))
    cached = jnp.where(high > low, lax.div(high + (TILE - 1), jnp.int32(TILE)) - first, 0)
    return _Part(part, row, low, high, kind, item - part * c.K, first, cached)


def _tiles(part: _Part):
    return part.cached + (part.kind & 1)


def _aligned(place):
    """The multiple of 8 that a copy begins at, and how far behind it `place` is."""
    begin = pl.multiple_of(place & ~(EIGHT - 1), EIGHT)
    return begin, place - begin


def _supply(c: _Static, m: _Shared, i: _Inputs, turns):
    """The memory warpgroup: all parts."""

    def copy(source, begin, rows, target, at, barrier):
        plgpu.copy_gmem_to_smem(source.at[pl.ds(begin, rows)], target.at[pl.ds(at, rows)], barrier)

    def page_of(part: _Part, n):
        place = jnp.clip((part.first + n) * TILE, 0, jnp.maximum(part.high - 1, 0))
        return i.table[part.row, lax.shift_right_logical(place, jnp.int32(log2(c.S)))]

    def fetch(part: _Part, n, page, pages, new, target, barrier):
        """One tile of keys or values; two arrivals, whatever is copied."""
        begin = (part.first + n) * TILE
        where = (page * c.K + part.head) * c.S + (begin & (c.S - 1))
        left = part.high - begin
        own = n >= part.cached

        @pl.when(own)
        def _():
            copy(new, _aligned(part.row * c.K + part.head)[0], EIGHT, target, 0, barrier)
            plgpu.barrier_arrive(barrier)

        @pl.when(jnp.logical_not(own) & (left > 48))
        def _():
            copy(pages, where, TILE, target, 0, barrier)
            plgpu.barrier_arrive(barrier)

        @pl.when(jnp.logical_not(own) & (left <= 48))
        def _():
            half = left > 16

            @pl.when(half)
            def _():
                copy(pages, where, 32, target, 0, barrier)

            @pl.when((left > 32) | jnp.logical_not(half))
            def _():
                at = jnp.where(half, 32, 0)
                copy(pages, where + at, 16, target, pl.multiple_of(at, 16), barrier)

            @pl.when(jnp.logical_not(half) | (left <= 32))
            def _():
                plgpu.barrier_arrive(barrier)

    def one(turn, carry):
        done, part, page = carry
        following, half = _load(c, i, turn + 1, turns), turn & 1
        plgpu.barrier_wait(m.q_freed.at[half])
        heads = _aligned(part.row * c.H + part.head * c.G)[0]
        copy(i.q, heads, c.group, m.q_tiles.at[half], 0, m.q_arrived.at[half])

        def tile(n, page):
            stage, last = lax.rem(done + n, jnp.int32(c.stages)), n + 1 == _tiles(part)
            after = jax.tree.map(lambda a, b: jnp.where(last, b, a), part, following)
            ahead = page_of(after, jnp.where(last, 0, n + 1))  # arrives while others are waited for
            plgpu.barrier_wait(m.k_freed.at[stage])
            fetch(part, n, page, i.k_pages, i.k, m.k_tiles.at[stage], m.k_arrived.at[stage])
            plgpu.barrier_wait(m.v_freed.at[stage])
            fetch(part, n, page, i.v_pages, i.v, m.v_tiles.at[stage], m.v_arrived.at[stage])
            return ahead

        page = lax.fori_loop(0, _tiles(part), tile, page)
        return done + _tiles(part), following, page

    begin = _load(c, i, 0, turns)
    done, *_ = lax.fori_loop(0, turns, one, (jnp.int32(0), begin, page_of(begin, 0)))
    for n in range(c.stages):  # what is freed last is waited for, too
        stage = lax.rem(done + n, jnp.int32(c.stages))
        plgpu.barrier_wait(m.k_freed.at[stage])
        plgpu.barrier_wait(m.v_freed.at[stage])
    for n in range(2):
        plgpu.barrier_wait(m.q_freed.at[(turns + n) & 1])


def _load_new(c: _Static, i: _Inputs, part: _Part):
    """The row's new key and value, [D] each, and their place."""
    load: Any = plgpu.load  # jax 0.11 has an index more, which may be left out
    layout = plgpu.Layout.WG_STRIDED((c.D,), vec_size=1)
    new = [load(x.at[part.row * c.K + part.head], layout=layout) for x in (i.k, i.v)]
    dest = i.dest[part.row]
    page = lax.shift_right_logical(dest, jnp.int32(log2(c.S)))
    return new, (page * c.K + part.head) * c.S + (dest & (c.S - 1))


def _mask(c: _Static, part: _Part, n, x):
    """Hide what is not the part's: x f32[ROWS, TILE]."""
    own = n >= part.cached
    begin = (part.first + n) * TILE
    new = _aligned(part.row * c.K + part.head)[1]
    low = jnp.where(own, new, part.low - begin)
    high = jnp.where(own, new + 1, part.high - begin)
    token = plgpu.broadcasted_iota(jnp.int32, x.shape, 1, layout=plgpu.Layout.WGMMA)
    return jnp.where((token >= low) & (token < high), x, NOTHING)


def _attend(c: _Static, m: _Shared, part: _Part, half, done):
    """One part: (accumulator f32[ROWS, D], maxima and sums f32[ROWS])."""

    def tile(n, carry):
        acc, top, total = carry
        stage = lax.rem(done + n, jnp.int32(c.stages))

        def logits(x_ref):
            plgpu.wgmma(x_ref, m.q_tiles.at[half], transposed(m.k_tiles.at[stage]))
            return x_ref[...]

        def values(y_ref):
            plgpu.wgmma(y_ref, m.p_tile, m.v_tiles.at[stage])
            return y_ref[...]

        plgpu.barrier_wait(m.k_arrived.at[stage])
        x = pl.run_scoped(logits, plgpu.WGMMAAccumulatorRef((ROWS, TILE), jnp.float32))
        plgpu.barrier_arrive(m.k_freed.at[stage])
        x = _mask(c, part, n, cap(x * (c.scale * LOG2E), c.softcap))
        peak = jnp.maximum(top, x.max(axis=1))
        p = jnp.exp2(x - lax.broadcast_in_dim(peak, x.shape, [0]))
        shrink = jnp.exp2(top - peak)
        m.p_tile[...] = p.astype(c.dtype)
        plgpu.commit_smem()
        plgpu.barrier_wait(m.v_arrived.at[stage])
        more = pl.run_scoped(values, plgpu.WGMMAAccumulatorRef((ROWS, c.D), jnp.float32))
        plgpu.barrier_arrive(m.v_freed.at[stage])
        acc = acc * lax.broadcast_in_dim(shrink, acc.shape, [0]) + more
        return acc, peak, total * shrink + p.sum(axis=1)

    layout = plgpu.Layout.WGMMA
    zeros = plgpu.layout_cast(jnp.zeros((ROWS, c.D), jnp.float32), layout)
    top, total = (
        plgpu.layout_cast(jnp.full((ROWS,), value, jnp.float32), layout.reduce(1))
        for value in (NOTHING, 0.0)
    )
    return lax.fori_loop(0, _tiles(part), tile, (zeros, top, total))


def _finish(c: _Static, m: _Shared, part: _Part, result, outputs):
    """Write a whole row's result, or what the merge needs of a part."""
    y_ref, acc_ref, max_ref, sum_ref = outputs
    acc, top, total = result
    heads = part.head * c.G
    mine = pl.ds(_aligned(part.row * c.H + heads)[1], c.G)  # of the rows, the G that count
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the part before has left

    @pl.when(part.kind >= 2)
    def _():
        y = acc * lax.broadcast_in_dim(1 / total, acc.shape, [0])
        put(m.y_tile, y.astype(c.dtype))
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(m.y_tile.at[mine], y_ref.at[part.row, pl.ds(heads, c.G)])

    @pl.when(part.kind < 2)
    def _():
        put(m.acc_tile, acc)
        put(m.sums.at[0], top)
        put(m.sums.at[1], total)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(m.acc_tile.at[mine], acc_ref.at[part.part, pl.ds(heads, c.G)])
        for n, target in enumerate((max_ref, sum_ref)):
            whole = m.sums.at[n, pl.ds(0, c.group)]
            plgpu.copy_smem_to_gmem(whole, target.at[part.part, part.head])


def _mix(c: _Static, m: _Shared, i: _Inputs, turns, outputs):
    """The mixer: all parts."""

    def one(turn, carry):
        done, part = carry
        following, half = _load(c, i, turn + 1, turns), turn & 1
        (key, value), where = _load_new(c, i, part)
        plgpu.barrier_wait(m.q_arrived.at[half])
        result = _attend(c, m, part, half, done)
        plgpu.barrier_arrive(m.q_freed.at[half])

        @pl.when(part.kind & 1 == 1)
        def _():  # only now: the copy engine has read the page
            i.k_pages[where] = key
            i.v_pages[where] = value

        _finish(c, m, part, result, outputs)
        return done + _tiles(part), following

    nothing = plgpu.layout_cast(jnp.zeros((TILE, c.D), c.dtype), plgpu.Layout.WGMMA)
    for stage in range(c.stages):  # a weight of 0 times what was never written must be 0
        m.v_tiles[stage] = nothing
    plgpu.commit_smem()
    for barriers, n in ((m.q_freed, 2), (m.k_freed, c.stages), (m.v_freed, c.stages)):
        for k in range(n):
            plgpu.barrier_arrive(barriers.at[k])
    lax.fori_loop(0, turns, one, (jnp.int32(0), _load(c, i, 0, turns)))
    plgpu.wait_smem_to_gmem(0)


def _kernel(c: _Static, *refs):
    i, outputs = _Inputs(*refs[:9]), refs[9:13]
    m = _Shared(*refs[13:])
    turns = _turns(c, i.used)
    mine = lax.axis_index("warpgroup")

    @pl.when((mine == 0) & (turns > 0))
    def _():
        plgpu.set_max_registers(240, action="increase")
        _mix(c, m, i, turns, outputs)

    @pl.when((mine == 1) & (turns > 0))
    def _():
        plgpu.set_max_registers(64, action="decrease")
        _supply(c, m, i, turns)


def _scratch(c: _Static) -> _Shared:
    """The shared memory and barriers to ask for."""
    shared = functools.partial(plgpu.SMEM, dtype=c.dtype, transforms=tiled())
    arrived = plgpu.Barrier(num_arrivals=2, num_barriers=c.stages)
    freed = plgpu.Barrier(num_barriers=c.stages)
    return _Shared(
        q_tiles=shared((2, ROWS, c.D)),
        k_tiles=shared((c.stages, TILE, c.D)),
        v_tiles=shared((c.stages, TILE, c.D)),
        p_tile=shared((ROWS, TILE)),
        y_tile=plgpu.SMEM((ROWS, c.D), c.dtype),
        acc_tile=plgpu.SMEM((ROWS, c.D), jnp.float32),
        sums=plgpu.SMEM((2, ROWS), jnp.float32),
        q_arrived=plgpu.Barrier(num_barriers=2),
        k_arrived=arrived,
        v_arrived=arrived,
        q_freed=plgpu.Barrier(num_barriers=2),
        k_freed=freed,
        v_freed=freed,
    )


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
    c = _Static(R, H, K, S, D, tuning.tiles, programs, scale, softcap, q.dtype)
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
        num_threads=2,
        thread_name="warpgroup",
        kernel_name="paged_decode_hopper",
        compiler_params=compiler_params(),
        interpret=interpret,
    )(
        plan.parts, used, batch.table, batch.dest, q.reshape(N * H, D),
        *(x.reshape(-1, D) for x in (k, v)), k_ref, v_ref,
    )  # fmt: skip
    pages = (jax.freeze(ref).reshape(P, K, S, D) for ref in (k_ref, v_ref))
    return plan, tuple(results), KV(*pages)
