"""Paged decode attention for NVIDIA GPUs (Pallas, Triton lowering): write one token a row, attend.

    y[r, h] = sum_t softmax_t(scale * q[r, h] . k[t, h // G]) v[t, h // G]      t < row_start[r] + 1

The new token's key and value come from registers and are stored in their page on the way; all older
ones are gathered from the shared pool, `tile` tokens at a time, by their page ids. Pages may hold 8
bits, with a scale per key-value head; a sink joins the softmax of the part with the new token.

    row 0  |=========== 4 parts ===========|n      n: the new token, taken by the row's last part
    row 1  |==|n                                   parts: equal shares of one row's tokens, of about
    row 2  (idle: no part)                         sum(tokens) / target each, or finer where rows
    row 3  |=======|n                              differ, so that all finish together

One program per (part, key-value head): the G query heads that share it are padded to the 16 rows or
more of one matrix product. A row of one part writes its result; a row of several leaves
(accumulator, maximum, sum) per part, which a second small kernel merges; that kernel also clears
idle rows.

Registers per program: 2 * tile * D of keys and values, rows * D float32 of accumulator.
"""

# mypy: allow-untyped-calls

import functools
from dataclasses import dataclass
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from octavo.pallas_kernels.attention.batch import RaggedBatch
from octavo.pallas_kernels.attention.reference import KV

LOG2E = 1.4426950408889634
NOTHING = -1e30  # a maximum over no logits; finite, so that differences never make NaN
ROWS = 16  # the smallest M of a tensor core product
MOST_HEADS = 64  # query heads of one key-value head: more rows than that spill
FINER = 4  # times the parts, where rows differ much
ENOUGH = 2048  # merging programs that fill the card
EIGHT = 8  # places that a key-value head's maxima and sums take at least
FEW = 1024  # results, below which a merge has multiprocessors to spare
EIGHT_BITS = ("float8_e4m3fn", "float8_e5m2", "int8")


@dataclass(frozen=True)
class DecodeTuning:
    """How the kernel is built; the defaults are what was measured to be the fastest."""

    tile: int = 64  # tokens of one iteration
    parts: int = 528  # programs that fill the card: 132 multiprocessors x 4 resident
    warps: int = 4
    merged: int = 16  # parts that one merge iteration reads: registers decide who is resident


DECODE = DecodeTuning()


@flax.struct.dataclass
class DecodePlan:
    """How a batch's rows are cut into parts. Depends on lengths alone: the same for every layer."""

    parts: jax.Array  # i32[W, 4] row (R: unused), first and end token, bits (1 last, 2 only)
    rows: jax.Array  # i32[R, 2] the row's first part, its number of parts (0: idle)


def plan_decode(batch: RaggedBatch, *, window: int, tile: int, target: int) -> DecodePlan:
    """Cut the rows' cached tokens into at most R + FINER * target parts of nearly equal length.

    About `target` parts where rows are alike: they run at once and end together. FINER times as
    many where they are not, so that those that end early leave room to others. One row is alike.
    """
    active = batch.row_count > 0
    end = jnp.where(active, batch.row_start, 0)
    first = jnp.maximum(end + 1 - window, 0) if window else jnp.zeros_like(end)
    base = first // tile * tile  # parts share no tile
    tokens = jnp.maximum(end - base, 0)

    alike = 2 * jnp.max(tokens) * jnp.sum(active) <= 3 * jnp.sum(tokens)
    most = target * (FINER if active.shape[0] > 1 else 1)
    span = _round_up(pl.cdiv(jnp.sum(tokens), jnp.where(alike, target, most)), tile)
    span = jnp.maximum(span, tile)
    nearest = jnp.maximum((tokens + span // 2) // span, 1)
    count = jnp.where(span > tile, nearest, jnp.maximum(pl.cdiv(tokens, tile), 1))
    size = _round_up(pl.cdiv(tokens, count), tile)
    count = jnp.maximum(pl.cdiv(tokens, jnp.maximum(size, 1)), 1) * active
    ends = jnp.cumsum(count)

    part = jnp.arange(count.shape[0] + most, dtype=jnp.int32)
    row = jnp.sum(ends[None, :] <= part[:, None], axis=1, dtype=jnp.int32)  # R where unused
    safe = jnp.minimum(row, count.shape[0] - 1)
    index = part - (ends - count)[safe]
    begin = base[safe] + index * size[safe]
    low = jnp.maximum(begin, first[safe])
    high = jnp.minimum(begin + size[safe], end[safe])
    kind = (index == count[safe] - 1) + 2 * (count[safe] == 1)
    return DecodePlan(
        jnp.stack([row, low, high, kind], axis=1).astype(jnp.int32),
        jnp.stack([ends - count, count], axis=1).astype(jnp.int32),
    )


def why_not_decode(q: jax.Array, k_pages: jax.Array, batch: RaggedBatch) -> str | None:
    """The reason this kernel refuses these arguments, or None if it takes them."""
    P, K, S, D = k_pages.shape
    if batch.tokens_per_row != 1:
        return f"a decode row has {batch.tokens_per_row} tokens; this kernel takes 1"
    if D & (D - 1) or not 32 <= D <= 256:
        return f"D={D} is not a power of two between 32 and 256"
    if q.shape[1] // K > MOST_HEADS:
        return f"{q.shape[1] // K} query heads a key-value head are more than {MOST_HEADS}"
    return why_not_cache(q, k_pages)


def why_not_cache(q: jax.Array, k_pages: jax.Array) -> str | None:
    """The reason no kernel here reads this cache for these queries, or None."""
    P, K, S, D = k_pages.shape
    if q.shape[1] % K:
        return f"H={q.shape[1]} query heads do not divide into K={K} groups"
    if q.dtype != k_pages.dtype and k_pages.dtype.name not in EIGHT_BITS:
        return f"queries are {q.dtype} and the cache is {k_pages.dtype}"
    if P * S * K * D >= 2**31:
        return f"a cache of {P * S * K * D} elements needs offsets of more than 32 bits"
    return None


def kept(x, scale, dtype):
    """Keys or values as a cache of `dtype` keeps them: over their scale, saturated."""
    if dtype == x.dtype and scale is None:
        return x
    x = x.astype(jnp.float32)
    if scale is not None:
        x = x / scale
    if jnp.issubdtype(dtype, jnp.integer):
        return _nearest(jnp.clip(x, -127, 127)).astype(dtype)
    if dtype.itemsize == 1:
        most = float(jnp.finfo(dtype).max)
        x = jnp.clip(x, -most, most)
    return x.astype(dtype)


def _nearest(x):
    """jnp.round, which Triton's lowering has not: halves go to even."""
    below = jnp.floor(x)
    over, odd = x - below, below - 2 * jnp.floor(below / 2)
    return below + ((over > 0.5) | ((over == 0.5) & (odd == 1))).astype(x.dtype)


def _round_up(x, multiple: int):
    return pl.cdiv(x, multiple) * multiple


def _gather(pages, where):
    """What _stream does, for the interpreter, which has no such loads."""
    return pages[where]


def _stream(pages, where):
    """Rows of the pages, each read once: they leave the caches to others."""
    return plt.load(pages.at[where], eviction_policy="evict_first")


def log2(n: int) -> int:
    """Of a power of two."""
    return n.bit_length() - 1


def dot(a, b, contract: tuple[int, int]):
    """a . b over one axis each, accumulated in float32; float32 operands stay float32."""
    exact = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dims, precision=exact, preferred_element_type=jnp.float32)


def cap(x, softcap: float):
    """softcap * tanh(x / softcap), for logits in units of log 2; exp2 is one instruction."""
    if not softcap:
        return x
    limit = softcap * LOG2E
    return limit - 2 * limit / (1 + jnp.exp2(x * (2 * LOG2E / limit)))


@dataclass(frozen=True)
class _Static:
    """What is known when the kernel is built."""

    G: int
    K: int
    S: int
    rows: int  # of a product: G and padding
    scale: float
    softcap: float
    tuning: DecodeTuning
    sinks: bool
    scaled: bool
    interpret: bool
    turned: "Turned | None" = None  # what there is are projections, not queries and keys


@dataclass(frozen=True)
class Turned:
    """How projections [N, K, J, D] become queries and keys. Axis J: G queries, a key, a value."""

    D: int
    half: int  # pairs are (i, i + half); what lies past 2 * half stays
    eps: float
    offset: float  # added to the norms' weights
    normed: bool

    @property
    def sources(self) -> int:
        """Arrays: the projections, cosines and sines, and the norms' weights."""
        return 4 if self.normed else 3


def _load_ready(c: _Static, sources, row, head):
    """From q [N, H, D], k and v [N, K, D]."""
    q_ref, k_ref, v_ref = sources
    heads = head * c.G + jnp.minimum(jnp.arange(c.rows), c.G - 1)  # padding repeats the last head
    return q_ref[row, heads], k_ref[row, head], v_ref[row, head]


def _load_turned(c: _Static, sources, row, head):
    """From the flat projections [N * K * J * D]; norms and turns on the way.

    The other element of a pair is loaded again instead of moved: a few lines of cache.
    """
    t: Any = c.turned
    mixed_ref, cos_ref, sin_ref, *norms = sources
    d, half = jnp.arange(t.D), t.half
    pair = jnp.where(d < half, d + half, jnp.where(d < 2 * half, d - half, d))
    angle = row * half + jnp.minimum(jnp.where(d < half, d, jnp.maximum(d - half, 0)), half - 1)
    cos = jnp.where(d < 2 * half, cos_ref[angle], 1.0)
    sin = jnp.where(d < 2 * half, sin_ref[angle], 0.0)
    sin = jnp.where(d < half, -sin, sin)
    first = (row * c.K + head) * (c.G + 2) * t.D
    member = jnp.minimum(jnp.arange(c.rows), c.G - 1)

    def turned(at, norm):  # at [...] where vectors begin -> [..., D]
        x = mixed_ref[at[..., None] + d].astype(jnp.float32)
        other = mixed_ref[at[..., None] + pair].astype(jnp.float32)
        if t.normed:  # rounded where separate steps would round
            unit = lax.rsqrt(jnp.sum(x * x, axis=-1) / t.D + t.eps)[..., None]
            own, others = (norms[0][norm * t.D + i].astype(jnp.float32) for i in (d, pair))
            x = (x * unit * (t.offset + own)).astype(mixed_ref.dtype).astype(jnp.float32)
            other = other * unit * (t.offset + others)
            other = other.astype(mixed_ref.dtype).astype(jnp.float32)
        return (x * cos + other * sin).astype(mixed_ref.dtype)

    key = first + c.G * t.D
    keys = turned(key + jnp.zeros((1,), jnp.int32), 1)
    return turned(first + member * t.D, 0), jnp.sum(keys, axis=0), mixed_ref[key + t.D + d]


def _kernel(c: _Static, parts_ref, table_ref, dest_ref, *refs):
    count = c.turned.sources if c.turned else 3
    sources, refs = refs[:count], refs[count:]
    *given, k_pages, v_pages, y_ref, k_out, v_out, acc_ref, max_ref, sum_ref = refs
    head, part = pl.program_id(0), pl.program_id(1)
    k_scale, v_scale = _scales(c, given, head)
    stream = _gather if c.interpret else _stream
    tile = c.tuning.tile
    row, low, high, kind = (parts_ref[part, i] for i in range(4))  # all before the first is used

    @pl.when(row < table_ref.shape[0])
    def _():
        heads = head * c.G + jnp.minimum(jnp.arange(c.rows), c.G - 1)
        member = heads % max_ref.shape[2]

        def place(i):
            t = jnp.minimum(low + i * tile + jnp.arange(tile), jnp.maximum(high - 1, 0))
            return (table_ref[row, t >> log2(c.S)] * c.K + head) * c.S + (t & (c.S - 1))

        load_row = _load_turned if c.turned else _load_ready
        q, k_new, v_new = load_row(c, sources, row, head)  # [rows, D], [D], [D]

        def load(where):
            return stream(k_pages, where), stream(v_pages, where)  # [tile, D] each

        def logits(k):
            x = dot(q, k.astype(q.dtype), (1, 1)) * _unit(c, k_scale)
            return cap(x, c.softcap)

        def attend(i, carry, k, v):
            acc, top, total = carry
            seen = low + i * tile + jnp.arange(tile) < high
            x = jnp.where(seen[None, :], logits(k), NOTHING)  # [rows, tile]
            peak = jnp.maximum(top, jnp.max(x, axis=1))
            p, shrink = jnp.exp2(x - peak[:, None]), jnp.exp2(top - peak)
            acc = acc * shrink[:, None] + dot(p.astype(q.dtype), v.astype(q.dtype), (1, 0))
            return acc, peak, total * shrink + jnp.sum(p, axis=1)

        def step(i, carry):
            return attend(i, carry, *load(place(i)))

        sink = given[0][heads] * LOG2E if c.sinks else None
        k_new = kept(k_new, k_scale, k_out.dtype)
        v_new = kept(v_new, v_scale, v_out.dtype)

        @pl.when(kind & 1 == 1)
        def store_new_token():
            where = _where(c, dest_ref[row], head)
            k_out[where] = k_new
            v_out[where] = v_new

        nothing = jnp.full((c.rows,), NOTHING, jnp.float32)
        start = (jnp.zeros(q.shape, jnp.float32), nothing, jnp.zeros_like(nothing))
        cached = lax.fori_loop(0, pl.cdiv(high - low, tile), step, start)
        # The new token joins last: its loads have ended long before, and nothing waits for them.
        acc, top, total = _new_token(c, kind & 1, q, k_new, v_new, sink, k_scale, cached)
        if v_scale is not None:
            acc = acc * v_scale

        @pl.when(kind >= 2)
        def write_result():
            y_ref[row, heads] = (acc / total[:, None]).astype(y_ref.dtype)

        @pl.when(kind < 2)
        def write_part():
            acc_ref[part, heads] = acc
            max_ref[part, head, member] = top
            sum_ref[part, head, member] = total


def _scales(c: _Static, given, head):
    """What this head's stored keys and values are multiplied with; None for nothing."""
    return (given[-1][0, head], given[-1][1, head]) if c.scaled else (None, None)


def _unit(c: _Static, k_scale):
    """What products of queries and stored keys are multiplied with, for logits to base 2."""
    unit = c.scale * LOG2E
    return unit if k_scale is None else unit * k_scale


def _where(c: _Static, dest, head):
    """The rows of the flat pages behind places in the pool."""
    return ((dest >> log2(c.S)) * c.K + head) * c.S + (dest & (c.S - 1))


def _new_token(c: _Static, last, q, k, v, sink, k_scale, carry):
    """Add the row's new key and value, as kept, to a softmax, if this part is the row's last."""
    acc, top, total = carry
    x = jnp.sum(q.astype(jnp.float32) * k.astype(jnp.float32)[None, :], axis=1)
    x = jnp.where(last == 1, cap(x * _unit(c, k_scale), c.softcap), NOTHING)
    peak = jnp.maximum(top, x)
    if sink is not None:
        peak = jnp.where(last == 1, jnp.maximum(peak, sink), peak)
    weight, shrink = jnp.where(last == 1, jnp.exp2(x - peak), 0.0), jnp.exp2(top - peak)
    total = total * shrink + weight
    if sink is not None:
        total = total + jnp.where(last == 1, jnp.exp2(sink - peak), 0.0)
    acc = acc * shrink[:, None] + v.astype(jnp.float32)[None, :] * weight[:, None]
    return acc, peak, total


def _merge_kernel(
    rows_ref, acc_ref, max_ref, sum_ref, y_in, y_ref, *, merged, columns, heads, group
):
    """Join the parts of a row's query heads, some columns; rows of one part are done, idle rows
    become zero. Maxima and sums are [W, K, max(8, group)]: gpu_hopper_decode.py says where."""
    row, first_head = pl.program_id(0), pl.program_id(1) * heads
    first, count = rows_ref[row, 0], rows_ref[row, 1]
    mine = pl.ds(pl.program_id(2) * columns, columns)

    def one_head(i, carry):
        head = first_head + i
        place = (head // group, head % max_ref.shape[2])

        def join(i, carry):
            acc, top, total = carry
            index = i * merged + jnp.arange(merged)
            part, there = first + jnp.minimum(index, count - 1), index < count
            maxima = jnp.where(there, max_ref[part, *place], NOTHING)
            peak = jnp.maximum(top, jnp.max(maxima, axis=0))
            weight = jnp.where(there, jnp.exp2(maxima - peak), 0.0)
            shrink = jnp.exp2(top - peak)
            acc = acc * shrink + jnp.sum(acc_ref[part, head, mine] * weight[:, None], axis=0)
            return acc, peak, total * shrink + jnp.sum(sum_ref[part, *place] * weight, axis=0)

        start = (jnp.zeros((columns,), jnp.float32), jnp.float32(NOTHING), jnp.float32(0))
        acc, _, total = lax.fori_loop(0, pl.cdiv(count, merged), join, start)
        y_ref[row, head, mine] = (acc / jnp.maximum(total, 1e-30)).astype(y_ref.dtype)
        return carry

    @pl.when(count != 1)
    def _():
        lax.fori_loop(0, heads, one_head, 0)


def decode(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cache: KV,
    batch: RaggedBatch,
    *,
    window: int = 0,
    scale: float,
    softcap: float = 0.0,
    sinks: jax.Array | None = None,
    kv_scales: jax.Array | None = None,
    tuning: DecodeTuning = DECODE,
    interpret: bool = False,
) -> tuple[jax.Array, KV]:
    """Write the rows' new tokens and attend: q [N, H, D], k, v [N, K, D] -> y [N, H, D], cache.

    Only the first R tokens, the rows', are read and written; the rest of y is whatever was there.
    The cache is updated in place where the caller gives it up. sinks f32[H], kv_scales f32[2, K] as
    in reference.py.
    """
    static: dict[str, Any] = dict(window=window, scale=scale, softcap=softcap)
    return _decode(
        (q, k, v), q.shape, cache, batch, **static, given=(sinks, kv_scales), tuning=tuning,
        interpret=interpret, turned=None,
    )  # fmt: skip


def decode_packed(
    mixed: jax.Array,
    turn: tuple[jax.Array, jax.Array],
    norms: jax.Array | None,
    cache: KV,
    batch: RaggedBatch,
    *,
    window: int = 0,
    scale: float,
    softcap: float = 0.0,
    eps: float = 0.0,
    offset: float = 0.0,
    sinks: jax.Array | None = None,
    kv_scales: jax.Array | None = None,
    tuning: DecodeTuning = DECODE,
    interpret: bool = False,
) -> tuple[jax.Array, KV]:
    """`decode` of projections as they come: mixed [R, K, J, D] -> y [R, H, D], cache.

    Norms (weights [2, D] of queries and keys, plus `offset`) and rotation (turn: cos and sin
    f32[R, 1, D'/2]) happen in the kernel, rounded where a program of separate steps would round.
    """
    N, K, J, D = mixed.shape
    turned = Turned(D, turn[0].shape[-1], eps, offset, norms is not None)
    flat_norms = () if norms is None else (norms.reshape(-1),)
    sources = (mixed.reshape(-1), turn[0].reshape(-1), turn[1].reshape(-1), *flat_norms)
    static: dict[str, Any] = dict(window=window, scale=scale, softcap=softcap)
    return _decode(
        sources, (N, K * (J - 2), D), cache, batch, **static, given=(sinks, kv_scales),
        tuning=tuning, interpret=interpret, turned=turned,
    )  # fmt: skip


def _decode(
    sources: tuple[jax.Array, ...],
    shape: tuple[int, ...],
    cache: KV,
    batch: RaggedBatch,
    *,
    window: int,
    scale: float,
    softcap: float,
    given: tuple[jax.Array | None, jax.Array | None],
    tuning: DecodeTuning,
    interpret: bool,
    turned: Turned | None,
) -> tuple[jax.Array, KV]:
    (_, H, D), (P, K, S, _) = shape, cache.k.shape
    target = max(1, tuning.parts // K)
    plan = plan_decode(batch, window=window, tile=tuning.tile, target=target)
    W, flat = plan.parts.shape[0], (P * K * S, D)
    sums = (W, K, together(H // K))
    f32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    c = _Static(
        G=H // K, K=K, S=S, rows=max(ROWS, 1 << (H // K - 1).bit_length()), scale=scale,
        softcap=softcap, tuning=tuning, sinks=given[0] is not None, scaled=given[1] is not None,
        interpret=interpret, turned=turned,
    )  # fmt: skip
    there = [x for x in given if x is not None]
    first = 3 + len(sources) + len(there)  # where the pages are among the arguments
    result = jax.ShapeDtypeStruct(shape, sources[0].dtype)
    y, k_flat, v_flat, acc, top, total = _call(
        functools.partial(_kernel, c),
        (K, W),
        (plan.parts, batch.table, batch.dest, *sources, *there,
         cache.k.reshape(flat), cache.v.reshape(flat)),
        (result, jax.ShapeDtypeStruct(flat, cache.k.dtype),
         jax.ShapeDtypeStruct(flat, cache.v.dtype), f32((W, H, D)), f32(sums), f32(sums)),
        aliases={first: 1, first + 1: 2}, warps=tuning.warps, name="paged_decode",
        interpret=interpret,
    )  # fmt: skip
    y = merge(plan, (y, acc, top, total), tuning.merged, interpret)
    return y, KV(k=k_flat.reshape(P, K, S, D), v=v_flat.reshape(P, K, S, D))


def together(G: int) -> int:
    """Places that the maxima and sums of a key-value head's G query heads take."""
    return max(EIGHT, G)


def merge(
    plan: DecodePlan, results: tuple[jax.Array, ...], merged: int, interpret: bool
) -> jax.Array:
    """results: y [N, H, D]; of each part acc f32[W, H, D], maxima and sums f32[W, K, max(8, G)] ->
    y with the rows of several parts too, and zeros for idle rows."""
    y, acc, top, total = results
    (_, H, D), R = y.shape, plan.rows.shape[0]
    # Few results: 32 columns a program, many parts at once. Many: several heads a program.
    merged, columns = (64, 32) if R * H <= FEW else (merged, D)
    heads = _heads_together(R, H)
    body = functools.partial(
        _merge_kernel, merged=merged, columns=columns, heads=heads, group=H // top.shape[1]
    )
    return _call(
        body,
        (R, H // heads, D // columns),
        (plan.rows, acc, top, total, y),
        jax.ShapeDtypeStruct(y.shape, y.dtype),
        aliases={4: 0}, warps=2, name="merge_decode", interpret=interpret,
    )  # fmt: skip


def _heads_together(R: int, H: int) -> int:
    """Query heads of one merging program: most rows have nothing to merge, and a start costs."""
    heads = 1
    while H % (2 * heads) == 0 and R * H // (2 * heads) >= ENOUGH:
        heads *= 2
    return heads


def _call(body, grid, arguments, out_shape, *, aliases, warps, name, interpret) -> Any:
    """A kernel that sees every array whole. One stage: deeper pipelines of gathers were slower."""
    return pl.pallas_call(
        body,
        grid=grid,
        out_shape=out_shape,
        input_output_aliases=aliases,
        compiler_params=plt.CompilerParams(num_warps=warps, num_stages=1),
        name=name,
        interpret=interpret,
    )(*arguments)
