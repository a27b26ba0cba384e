"""Chunked prefill attention over cached pages for NVIDIA GPUs (Pallas, Triton lowering).

    y[t, h] = sum_j softmax_j(scale * q[t, h] . k[j, h // G]) v[j, h // G]      j <= position of t

The chunks' own keys and values are already in their pages, so a chunk's past and its present are
read alike. Chunks lie one behind another among the T tokens; each is cut into blocks of queries:

    T      |---- chunk 0 ----|-- chunk 1 --|-- 2 --|  padding  |
    blocks |  0  |  1  |  2  |  0  |  1  |.|  0  |.|  0  |  1  |     . a block's unused tokens

One program per (block, query head). It walks the keys its tokens may see, `tile` tokens at a time:
first the tiles that every token of the block sees whole, then those with the diagonal or a window's
edge in them, where logits are masked. Padding is one more chunk that sees nothing: it becomes zero.

Pages may hold 8 bits, with a scale per key-value head; a sink joins the softmax at the end.

Shared memory per program: block * D * itemsize of queries and 2 * tile * stages * D of the cache's.
"""

# mypy: allow-untyped-calls

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from octavo.pallas_kernels.attention.batch import RaggedBatch
from octavo.pallas_kernels.attention.gpu_decode import LOG2E, NOTHING, cap, dot, log2, why_not_cache
from octavo.pallas_kernels.attention.reference import KV


@dataclass(frozen=True)
class PrefillTuning:
    """How the kernel is built."""

    block: int = 128  # queries
    tile: int = 64  # keys
    warps: int = 8
    stages: int = 2

    def shared(self, D: int, itemsize: int, kept: int) -> int:
        """Bytes of shared memory; `itemsize` of the queries, `kept` of the cache."""
        return self.block * D * itemsize + 2 * self.tile * self.stages * D * kept


PREFILL = PrefillTuning()
SMALLER = (
    PREFILL,
    PrefillTuning(stages=1),
    PrefillTuning(64, 32, 4, 2),
    PrefillTuning(64, 32, 4, 1),
)


def prefill_tuning(D: int, itemsize: int, kept: int, most: int) -> PrefillTuning:
    """The first that needs at most `most` bytes of shared memory, else the smallest."""
    fitting = (t for t in SMALLER if t.shared(D, itemsize, kept) <= most)
    return next(fitting, SMALLER[-1])


def plan_prefill(batch: RaggedBatch, T: int, block: int, *, base: int = 0) -> jax.Array:
    """The blocks of a step, i32[W, 4]: first token, tokens, position, slot (-1: padding).

    Tokens count from `base`, where the chunks begin. Later blocks of a chunk, which see more keys,
    come first. An unused entry has no tokens.
    """
    used = jnp.sum(batch.chunk_count)
    count = jnp.append(batch.chunk_count, T - used)
    offset = jnp.append(batch.chunk_offset, used) + base
    slot = jnp.append(batch.chunk_slot, -1)
    start = jnp.append(batch.chunk_start, 0)
    blocks = pl.cdiv(count, block)
    ends = jnp.cumsum(blocks)

    most = pl.cdiv(T, block) + count.shape[0]
    entry = jnp.arange(most, dtype=jnp.int32)
    chunk = jnp.sum(ends[None, :] <= entry[:, None], axis=1, dtype=jnp.int32)
    safe = jnp.minimum(chunk, count.shape[0] - 1)
    skip = (ends[safe] - 1 - entry) * block
    size = jnp.where(chunk < count.shape[0], jnp.minimum(count[safe] - skip, block), 0)
    plan = [offset[safe] + skip, size, start[safe] + skip, slot[safe]]
    return jnp.stack(plan, axis=1).astype(jnp.int32)


def why_not_prefill(q: jax.Array, k_pages: jax.Array) -> str | None:
    """The reason this kernel refuses these arguments, or None if it takes them."""
    D = k_pages.shape[3]
    if D & (D - 1) or not 32 <= D <= 256:
        return f"D={D} is not a power of two between 32 and 256"
    return why_not_cache(q, k_pages)


def _kernel(plan_ref, table_ref, q_ref, *refs,
            G, K, S, block, tile, window, scale, softcap, sinks, scaled):  # fmt: skip
    *given, k_pages, v_pages, _y_in, y_ref = refs
    head, entry = pl.program_id(0), pl.program_id(1)
    token, size = plan_ref[entry, 0], plan_ref[entry, 1]
    position, slot = plan_ref[entry, 2], plan_ref[entry, 3]

    @pl.when(size > 0)
    def _():
        member = jnp.arange(block)
        tokens = token + jnp.minimum(member, size - 1)  # unused rows repeat the last token
        at = position + jnp.minimum(member, size - 1)
        end = jnp.where(slot < 0, 0, position + size)
        low = jnp.maximum(position + 1 - window, 0) if window else 0
        row = jnp.maximum(slot, 0)
        q = q_ref[tokens, head]  # [block, D]
        k_scale, v_scale = (given[-1][i, head // G] if scaled else 1.0 for i in (0, 1))

        def step(i, carry, masked):
            acc, top, total = carry
            j = i * tile + jnp.arange(tile)
            seen = jnp.minimum(j, end - 1)
            where = (table_ref[row, seen >> log2(S)] * K + head // G) * S + (seen & (S - 1))
            k, v = (pages[where].astype(q.dtype) for pages in (k_pages, v_pages))  # [tile, D] each
            x = cap(dot(q, k, (1, 1)) * (scale * LOG2E * k_scale), softcap)
            if masked:
                keep = j[None, :] <= at[:, None]
                if window:
                    keep &= j[None, :] > at[:, None] - window
                x = jnp.where(keep, x, NOTHING)  # what a row adds before its first key shrinks to 0
            peak = jnp.maximum(top, jnp.max(x, axis=1))
            p, shrink = jnp.exp2(x - peak[:, None]), jnp.exp2(top - peak)
            acc = acc * shrink[:, None] + dot(p.astype(v.dtype), v, (1, 0))
            return acc, peak, total * shrink + jnp.sum(p, axis=1)

        carry = (
            jnp.zeros((block, q.shape[1]), jnp.float32),
            jnp.full((block,), NOTHING, jnp.float32),
            jnp.zeros((block,), jnp.float32),
        )
        first, last = low // tile, pl.cdiv(end, tile)
        whole = jnp.minimum((position + 1) // tile, last)  # tiles before it lie under the diagonal
        edge = jnp.minimum(_last_edge(position, size, window, tile), last) if window else 0
        plain, masked = functools.partial(step, masked=False), functools.partial(step, masked=True)
        if window:
            carry = lax.fori_loop(first, edge, masked, carry)
            first, whole = edge, jnp.maximum(whole, edge)
        carry = lax.fori_loop(first, whole, plain, carry)
        acc, top, total = lax.fori_loop(whole, last, masked, carry)
        if sinks:  # much larger than all logits it is infinite, and the result 0
            total += jnp.exp2(given[0][head] * LOG2E - top)
        y = acc * (v_scale / jnp.maximum(total, 1e-30))[:, None]
        y_ref[tokens, head] = y.astype(y_ref.dtype)


def _last_edge(position, size, window, tile):
    """The first tile that the block's last token sees from its beginning."""
    return pl.cdiv(jnp.maximum(position + size - window, 0), tile)


def prefill(
    q: jax.Array,
    y: jax.Array,
    cache: KV,
    batch: RaggedBatch,
    *,
    window: int = 0,
    scale: float,
    softcap: float = 0.0,
    sinks: jax.Array | None = None,
    kv_scales: jax.Array | None = None,
    tuning: PrefillTuning = PREFILL,
    interpret: bool = False,
) -> jax.Array:
    """Attend the chunks' tokens, whose keys are in their pages: q, y [N, H, D] -> y [N, H, D].

    The rows' part of y is kept, the chunks' part replaced; padding tokens become zeros.
    sinks f32[H], kv_scales f32[2, K] as in reference.py.
    """
    (N, H, D), (P, K, S, _) = q.shape, cache.k.shape
    base = batch.table.shape[0] * batch.tokens_per_row
    plan = plan_prefill(batch, N - base, tuning.block, base=base)
    body = functools.partial(
        _kernel, G=H // K, K=K, S=S, block=tuning.block, tile=tuning.tile, window=window,
        scale=scale, softcap=softcap, sinks=sinks is not None, scaled=kv_scales is not None,
    )  # fmt: skip
    given = [x for x in (sinks, kv_scales) if x is not None]
    pages = [x.reshape(P * K * S, D) for x in (cache.k, cache.v)]
    return pl.pallas_call(
        body,
        grid=(H, plan.shape[0]),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        input_output_aliases={5 + len(given): 0},
        compiler_params=plt.CompilerParams(num_warps=tuning.warps, num_stages=tuning.stages),
        name="paged_prefill",
        interpret=interpret,
    )(plan, batch.table, q, *given, *pages, y)
