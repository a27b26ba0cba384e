"""Paged decode attention for NVIDIA GPUs (Pallas, Triton lowering): write one token a row, attend.

    y[r, h] = sum_t softmax_t(scale * q[r, h] . k[t, h // G]) v[t, h // G]      t < row_start[r] + 1

The new token's key and value come from registers and are stored in their page on the way; all older
ones are gathered from the shared pool, `tile` tokens at a time, by their page ids:

    row 0  |=========== 4 parts ===========|n      n: the new token, taken by the row's last part
    row 1  |==|n                                   parts: equal shares of one row's tokens, of about
    row 2  (idle: no part)                         sum(tokens) / target each, or finer where rows
    row 3  |=======|n                              differ, so that all finish together

One program per (part, key-value head): the G query heads that share it are padded to 16 rows of one
matrix product. A row of one part writes its result; a row of several leaves (accumulator, maximum,
sum) per part, which a second small kernel merges; that kernel also clears idle rows.

Registers per program: 2 * tile * D of keys and values, 16 * D float32 of accumulator.
"""

# mypy: allow-untyped-calls

import functools
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
MERGED = 16  # parts that one merge iteration reads: more registers leave fewer programs resident
FINER = 4  # times the parts, where rows differ much


@flax.struct.dataclass
class DecodePlan:
    """How a batch's rows are cut into parts. Depends on lengths alone: the same for every layer."""

    parts: jax.Array  # i32[W, 4] row (R: unused), first and end token, bits (1 last, 2 only)
    rows: jax.Array  # i32[R, 2] the row's first part, its number of parts (0: idle)


def plan_decode(batch: RaggedBatch, *, window: int, tile: int, target: int) -> DecodePlan:
    """Cut the rows' cached tokens into at most R + FINER * target parts of nearly equal length.

    About `target` parts where rows are alike: they run at once and end together. FINER times as
    many where they are not, so that those that end early leave room to others.
    """
    active = batch.row_count > 0
    end = jnp.where(active, batch.row_start, 0)
    first = jnp.maximum(end + 1 - window, 0) if window else jnp.zeros_like(end)
    tokens = jnp.maximum(end - first, 0)

    alike = 2 * jnp.max(tokens) * jnp.sum(active) <= 3 * jnp.sum(tokens)
    most = FINER * target
    span = _round_up(pl.cdiv(jnp.sum(tokens), jnp.where(alike, target, most)), tile)
    span = jnp.maximum(span, 2 * tile)  # shorter parts cost more to merge than they save
    count = jnp.maximum((tokens + span // 2) // span, 1) * active  # the nearest number
    size = _round_up(pl.cdiv(tokens, jnp.maximum(count, 1)), tile)
    ends = jnp.cumsum(count)

    part = jnp.arange(count.shape[0] + most, dtype=jnp.int32)
    row = jnp.sum(ends[None, :] <= part[:, None], axis=1, dtype=jnp.int32)  # R where unused
    safe = jnp.minimum(row, count.shape[0] - 1)
    index = part - (ends - count)[safe]
    low = first[safe] + index * size[safe]
    high = jnp.minimum(low + size[safe], end[safe])
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
    if q.shape[1] % K:
        return f"H={q.shape[1]} query heads do not divide into K={K} groups"
    if q.dtype != k_pages.dtype:
        return f"queries are {q.dtype} and the cache is {k_pages.dtype}"
    if P * S * K * D >= 2**31:
        return f"a cache of {P * S * K * D} elements needs offsets of more than 32 bits"
    return None


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


def _kernel(parts_ref, table_ref, dest_ref, q_ref, k_ref, v_ref, k_pages, v_pages,
            y_ref, k_out, v_out, acc_ref, max_ref, sum_ref, *,
            G, S, tile, scale, softcap, prefetch, interpret):  # fmt: skip
    head, part, K = pl.program_id(0), pl.program_id(1), k_ref.shape[1]
    stream = _gather if interpret else _stream
    row = parts_ref[part, 0]

    @pl.when(row < table_ref.shape[0])
    def _():
        low, high, kind = parts_ref[part, 1], parts_ref[part, 2], parts_ref[part, 3]
        heads = head * G + jnp.minimum(jnp.arange(ROWS), G - 1)  # padding repeats the last head
        q = q_ref[row, heads]  # [ROWS, D]

        def fetch(i):
            t = jnp.minimum(low + i * tile + jnp.arange(tile), jnp.maximum(high - 1, 0))
            page, offset = table_ref[row, t >> log2(S)], t & (S - 1)
            where = (page * K + head) * S + offset
            return stream(k_pages, where), stream(v_pages, where)  # [tile, D] each

        def logits(k):
            return cap(dot(q, k, (1, 1)) * (scale * LOG2E), softcap)

        def attend(i, carry, k, v):
            acc, top, total = carry
            seen = low + i * tile + jnp.arange(tile) < high
            x = jnp.where(seen[None, :], logits(k), NOTHING)  # [ROWS, tile]
            peak = jnp.maximum(top, jnp.max(x, axis=1))
            p, shrink = jnp.exp2(x - peak[:, None]), jnp.exp2(top - peak)
            acc = acc * shrink[:, None] + dot(p.astype(v.dtype), v, (1, 0))
            return acc, peak, total * shrink + jnp.sum(p, axis=1)

        def step(i, carry):
            return attend(i, carry, *fetch(i))

        def step_ahead(i, carry):
            ahead = fetch(i + 1)
            return (*attend(i, carry[:3], *carry[3:]), *ahead)

        refs = (dest_ref, k_ref, v_ref, k_out, v_out)
        new = _new_token(kind & 1, row, head, q, refs, S, scale, softcap)
        turns = pl.cdiv(high - low, tile)
        if prefetch:
            acc, top, total, *_ = lax.fori_loop(0, turns, step_ahead, (*new, *fetch(0)))
        else:
            acc, top, total = lax.fori_loop(0, turns, step, new)

        @pl.when(kind >= 2)
        def write_result():
            y_ref[row, heads] = (acc / total[:, None]).astype(y_ref.dtype)

        @pl.when(kind < 2)
        def write_part():
            acc_ref[part, heads] = acc
            max_ref[part, heads] = top
            sum_ref[part, heads] = total


def _new_token(last, row, head, q, refs, S, scale, softcap):
    """Store the row's new key and value, and begin the softmax with them, if this part is last."""
    dest_ref, k_ref, v_ref, k_out, v_out = refs
    k, v = k_ref[row, head], v_ref[row, head]  # [D] each
    D, K = k.shape[0], k_ref.shape[1]
    where = ((dest_ref[row] >> log2(S)) * K + head) * S + (dest_ref[row] & (S - 1))

    @pl.when(last == 1)
    def _():
        k_out[where] = k
        v_out[where] = v

    x = jnp.sum(q.astype(jnp.float32) * k.astype(jnp.float32)[None, :], axis=1)
    x = cap(x * (scale * LOG2E), softcap)
    top = jnp.where(last == 1, x, NOTHING)
    total = jnp.where(last == 1, jnp.ones_like(x), 0.0)
    acc = jnp.broadcast_to(v.astype(jnp.float32)[None, :], (ROWS, D)) * total[:, None]
    return acc, top, total


def _merge_kernel(rows_ref, acc_ref, max_ref, sum_ref, y_in, y_ref):
    """Join the parts of one (row, query head); rows of one part are done, idle rows become zero."""
    row, head = pl.program_id(0), pl.program_id(1)
    first, count = rows_ref[row, 0], rows_ref[row, 1]

    @pl.when(count != 1)
    def _():
        def join(i, carry):
            acc, top, total = carry
            index = i * MERGED + jnp.arange(MERGED)
            part, there = first + jnp.minimum(index, count - 1), index < count
            maxima = jnp.where(there, max_ref[part, head], NOTHING)
            peak = jnp.maximum(top, jnp.max(maxima, axis=0))
            weight = jnp.where(there, jnp.exp2(maxima - peak), 0.0)
            shrink = jnp.exp2(top - peak)
            acc = acc * shrink + jnp.sum(acc_ref[part, head] * weight[:, None], axis=0)
            return acc, peak, total * shrink + jnp.sum(sum_ref[part, head] * weight, axis=0)

        start = (jnp.zeros(y_ref.shape[-1:], jnp.float32), jnp.float32(NOTHING), jnp.float32(0))
        acc, _, total = lax.fori_loop(0, pl.cdiv(count, MERGED), join, start)
        y_ref[row, head] = (acc / jnp.maximum(total, 1e-30)).astype(y_ref.dtype)


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
    tile: int = 64,
    target: int = 0,
    warps: int = 4,
    prefetch: bool = False,
    interpret: bool = False,
) -> tuple[jax.Array, KV]:
    """Write the rows' new tokens and attend: q [N, H, D], k, v [N, K, D] -> y [N, H, D], cache.

    Only the first R tokens, the rows', are read and written; the rest of y is whatever was there.
    The cache is updated in place where the caller gives it up. `target` parts per key-value head
    fill the card, see plan_decode.
    """
    (_, H, D), (P, K, S, _), R = q.shape, cache.k.shape, batch.table.shape[0]
    target = target or max(1, 528 // K)  # 132 multiprocessors x 4 resident programs
    plan = plan_decode(batch, window=window, tile=tile, target=target)
    W = plan.parts.shape[0]
    flat = (P * K * S, D)
    f32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    body = functools.partial(
        _kernel,
        G=H // K,
        S=S,
        tile=tile,
        scale=scale,
        softcap=softcap,
        prefetch=prefetch,
        interpret=interpret,
    )
    y, k_flat, v_flat, acc, top, total = _call(
        body,
        (K, W),
        (plan.parts, batch.table, batch.dest, q, k, v,
         cache.k.reshape(flat), cache.v.reshape(flat)),
        (jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct(flat, cache.k.dtype),
         jax.ShapeDtypeStruct(flat, cache.v.dtype), f32((W, H, D)), f32((W, H)), f32((W, H))),
        aliases={6: 1, 7: 2}, warps=warps, name="paged_decode", interpret=interpret,
    )  # fmt: skip
    y = _call(
        _merge_kernel,
        (R, H),
        (plan.rows, acc, top, total, y),
        jax.ShapeDtypeStruct(q.shape, q.dtype),
        aliases={4: 0}, warps=2, name="merge_decode", interpret=interpret,
    )  # fmt: skip
    return y, KV(k=k_flat.reshape(P, K, S, D), v=v_flat.reshape(P, K, S, D))


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
