"""Attention of prompt chunks over their pages on a TPU.

    a block: BQ tokens of one chunk, all heads     row g * BQ + t of a head: token t, query head g
    blocks:  chunk 0: block block block | chunk 1: block | ...        one grid step each
    a block walks over its sequence's cached tokens, C at a time:

    step i:  start the pages of the next C tokens (this block's, or the next block's first)
             wait for these, attend

so that only the very first copies of a call are waited for idly. The page ids of the next block's
sequence come to SMEM while a block is attended. Each KV head is a matrix product of its own: with
BQ * G rows, the unit is busy without the pairs of decode. 8-bit keys and values are widened to
bfloat16 here, once for all the rows.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from octavo.pallas_kernels.attention.batch import RaggedBatch
from octavo.pallas_kernels.attention.tpu_layout import LANES, Layout

MASKED = -1e30
LOG2E = 1.4426950408889634
IDS = 128  # SMEM copies come in multiples of 512 bytes
ROWS = 512  # rows of a head in a block, about
PART = 256  # rows of one matrix product
BUFFER = 4 << 20  # the most bytes of one of the two buffers
VMEM = 48 << 20  # v5p and tpu7x have 64 MiB a core


def block_tokens(group: int) -> int:
    """BQ, a power of two."""
    size = 128
    while size > 16 and size * group > ROWS:
        size //= 2
    return size


def chunk_tokens(layout: Layout, page_size: int, itemsize: int) -> int:
    """C cached tokens that are attended to at once, a multiple of the page size."""
    size = 512
    while size > LANES and layout.tiles * size * layout.width * itemsize > BUFFER:
        size //= 2
    return max(size, page_size)


def _kernel(
    # SMEM
    used: Any,  # i32[2] blocks, the layer
    slot_of: Any,  # i32[NB] the block's row of the table
    begin: Any,  # i32[NB] position of its first token
    end: Any,  # i32[NB] position after its last real token
    first: Any,  # i32[NB] the first C tokens that it sees
    base: Any,  # i32[NB] walk steps of the blocks before it
    q: Any,  # VMEM [1, K, M, W]
    table: Any,  # HBM i32[R, M'] page ids, M' a multiple of IDS
    pages: Any,  # HBM [L, P, tiles, S, W]
    out: Any,  # VMEM [1, K, M, W]
    buffer: Any,  # VMEM [2, tiles, C, W]
    ids: Any,  # SMEM i32[2, M']
    m: Any,  # VMEM f32[K, M, LANES]
    norm: Any,
    acc: Any,  # VMEM f32[K, M, W]
    page_sem: Any,
    id_sem: Any,
    *,
    layout: Layout,
    BQ: int,
    window: int,
    softcap: float,
) -> None:
    b = pl.program_id(0)
    S, C = pages.shape[3], buffer.shape[2]
    per, shift = C // S, S.bit_length() - 1
    M = q.shape[2]
    narrow = jnp.dtype(buffer.dtype).itemsize == 1

    def id_copy(b: Any) -> Any:
        return pltpu.make_async_copy(table.at[slot_of[b]], ids.at[b % 2], id_sem)

    def count(b: Any, c: Any) -> Any:
        return jnp.clip((end[b] - c * C + S - 1) >> shift, 0, per)

    def start_pages(b: Any, c: Any, side: Any) -> None:
        def one(j: Any, _: None) -> None:
            into = buffer.at[side, :, pl.ds(pl.multiple_of(j * S, S), S)]
            source = pages.at[used[1], ids[b % 2, c * per + j]]
            pltpu.make_async_copy(source, into, page_sem.at[side]).start()

        jax.lax.fori_loop(0, count(b, c), one, None)

    def wait_pages(b: Any, c: Any, side: Any) -> None:
        n, bit = count(b, c), per
        while bit:  # any number of pages in a few waits of static sizes

            @pl.when((n & bit) != 0)
            def _(bit: int = bit) -> None:
                part = buffer.at[side, :, pl.ds(0, bit * S)]
                pltpu.make_async_copy(part, part, page_sem.at[side]).wait()

            bit //= 2

    def attend(c: Any, side: Any, masked: bool) -> None:
        def rows(h: Any, k: Any, v: Any, at: int) -> None:
            """A part of a head's rows, so that one part's softmax hides another's products."""
            part = min(PART, M - at)
            mine = pl.ds(at, part)
            dims = (((1,), (1,)), ((), ()))
            s = jax.lax.dot_general(q[0, h, mine], k, dims, preferred_element_type=jnp.float32)
            if softcap:
                s = (softcap * LOG2E) * jnp.tanh(s * (1 / (softcap * LOG2E)))
            if masked:
                row = jax.lax.broadcasted_iota(jnp.int32, (part, C), 0) + at
                behind = begin[b] - c * C + (row & (BQ - 1))
                behind -= jax.lax.broadcasted_iota(jnp.int32, (part, C), 1)
                seen = behind >= 0
                if window:
                    seen &= behind < window
                s = jnp.where(seen, s, MASKED)
            before = m[h, mine]
            peak = jnp.maximum(before, jnp.max(s, axis=-1, keepdims=True))
            p = jnp.exp2(s - peak[:, :1])
            decay = jnp.exp2(before - peak)
            m[h, mine] = peak
            norm[h, mine] = norm[h, mine] * decay + jnp.sum(p, axis=-1, keepdims=True)
            y = jnp.dot(p.astype(v.dtype), v, preferred_element_type=jnp.float32)
            acc[h, mine] = acc[h, mine] * decay[:, :1] + y

        def head(h: Any, _: None) -> None:
            k, v = buffer[side, h], buffer[side, h if layout.shared else layout.kv_heads + h]
            if narrow:
                k, v = k.astype(jnp.bfloat16), v.astype(jnp.bfloat16)
            for at in range(0, M, PART):
                rows(h, k, v, at)

        jax.lax.fori_loop(0, layout.kv_heads, head, None)

    def step(i: Any, steps: Any) -> None:
        c, side = first[b] + i, (base[b] + i) % 2

        @pl.when(i + 1 < steps)
        def _() -> None:
            start_pages(b, c + 1, 1 - side)

        @pl.when((i + 1 == steps) & (b + 1 < used[0]))
        def _() -> None:
            id_copy(b + 1).wait()
            start_pages(b + 1, first[b + 1], 1 - side)

        wait_pages(b, c, side)
        clear = (c + 1) * C <= begin[b] + 1  # all of it lies before every token
        if window:
            clear &= c * C > begin[b] + BQ - 1 - window
        pl.when(clear)(lambda: attend(c, side, masked=False))
        pl.when(~clear)(lambda: attend(c, side, masked=True))

    @pl.when((b == 0) & (used[0] > 0))
    def _() -> None:
        id_copy(b).start()
        # What was never written may be no number, and 0 times that is none either.
        buffer[...] = jnp.zeros_like(buffer)
        id_copy(b).wait()
        start_pages(b, first[b], base[b] % 2)

    @pl.when(b < used[0])
    def _() -> None:
        pl.when(b + 1 < used[0])(lambda: id_copy(b + 1).start())
        m[...] = jnp.full_like(m, MASKED)
        norm[...] = jnp.zeros_like(norm)
        acc[...] = jnp.zeros_like(acc)
        steps = (end[b] - 1) // C - first[b] + 1
        jax.lax.fori_loop(0, steps, lambda i, _: step(i, steps), None)
        out[0] = (acc[...] / norm[...][..., :1]).astype(out.dtype)


def _plan(batch: RaggedBatch, T: int, BQ: int, C: int, window: int) -> tuple[jax.Array, ...]:
    """The kernel's SMEM arrays; then i32[NB, BQ] the chunk token of each block's rows, and i32[T]
    the block row (block * BQ + t) of each chunk token."""
    start, size = batch.chunk_start, batch.chunk_count
    entries = start.shape[0]
    NB = T // BQ + entries
    blocks = (size + BQ - 1) // BQ
    ends = jnp.cumsum(blocks)
    block = jnp.arange(NB, dtype=jnp.int32)
    chunk = jnp.minimum(jnp.sum(block[:, None] >= ends[None], axis=1), entries - 1)
    t = (block - (ends - blocks)[chunk]) * BQ  # the block's first token in its chunk
    begin = start[chunk] + t
    end = start[chunk] + jnp.minimum(size[chunk], t + BQ)
    first = jnp.maximum(begin - window + 1, 0) // C if window else jnp.zeros_like(begin)
    steps = jnp.where(block < ends[-1], (end - 1) // C - first + 1, 0)
    base = jnp.cumsum(steps) - steps
    tokens = (batch.chunk_offset[chunk] + t)[:, None] + jnp.arange(BQ, dtype=jnp.int32)
    token = jnp.arange(T, dtype=jnp.int32)
    mine = jnp.sum(token[:, None] >= (batch.chunk_offset + size)[None], axis=1)
    mine = jnp.minimum(mine, entries - 1)
    rows = (ends - blocks)[mine] * BQ + token - batch.chunk_offset[mine]
    smem = (ends[-1:], batch.chunk_slot[chunk], begin, end, first, base)
    return (
        *(array.astype(jnp.int32) for array in smem),
        jnp.clip(tokens, 0, T - 1),
        jnp.clip(rows, 0, NB * BQ - 1),
    )


def prefill(
    q: jax.Array,
    pages: jax.Array,
    layer: jax.Array,
    batch: RaggedBatch,
    *,
    layout: Layout,
    window: int,
    scale: float,
    softcap: float,
    interpret: Any = False,
) -> jax.Array:
    """What the T chunk tokens q [T, H, D] attend to, over pages that hold them already.

    pages [L, P, tiles, S, W], layer i32[].

    Returns y [T, H, D] in the dtype of q; zeros for tokens of no chunk.
    """
    T, H, D = q.shape
    K, G, W = layout.kv_heads, layout.group, layout.width
    BQ, S = block_tokens(G), pages.shape[3]
    C = chunk_tokens(layout, S, pages.dtype.itemsize)
    used, *smem, tokens, rows = _plan(batch, T, BQ, C, window)
    smem = [jnp.append(used, layer), *smem]
    NB, M = tokens.shape[0], BQ * G
    kind = jnp.bfloat16 if pages.dtype.itemsize == 1 else pages.dtype
    scaled = (q.astype(jnp.float32) * (scale * LOG2E)).astype(kind)
    blocks = scaled[tokens].reshape(NB, BQ, K, G, D).transpose(0, 2, 3, 1, 4)
    blocks = jnp.pad(blocks.reshape(NB, K, M, D), [(0, 0)] * 3 + [(0, W - D)])
    table = jnp.pad(batch.table, [(0, 0), (0, -batch.table.shape[1] % IDS)])

    def at(b: Any, used: Any, *_: Any) -> tuple[Any, int, int, int]:
        return jnp.minimum(b, jnp.maximum(used[0] - 1, 0)), 0, 0, 0

    spec = pl.BlockSpec((1, K, M, W), at)
    hbm = pl.BlockSpec(memory_space=pl.ANY)
    out = pl.pallas_call(
        functools.partial(_kernel, layout=layout, BQ=BQ, window=window, softcap=softcap),
        name="tpu_prefill",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(smem),
            grid=(NB,),
            in_specs=[spec, hbm, hbm],
            out_specs=spec,
            scratch_shapes=[
                pltpu.VMEM((2, layout.tiles, C, W), pages.dtype),
                pltpu.SMEM((2, table.shape[1]), jnp.int32),
                pltpu.VMEM((K, M, LANES), jnp.float32),
                pltpu.VMEM((K, M, LANES), jnp.float32),
                pltpu.VMEM((K, M, W), jnp.float32),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SemaphoreType.DMA,
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(blocks.shape, q.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",),
            disable_bounds_checks=True,
            vmem_limit_bytes=VMEM,
        ),
        interpret=interpret,
    )(*smem, blocks, table, pages)
    heads = out[..., layout.value_lane : layout.value_lane + D].reshape(NB, K, G, BQ, D)
    y = heads.transpose(0, 3, 1, 2, 4).reshape(NB * BQ, H, D)[rows]
    covered = jnp.arange(T) < jnp.sum(batch.chunk_count)
    return jnp.where(covered[:, None, None], y, 0)
