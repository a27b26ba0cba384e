"""Attention of prompt chunks over their pages on a TPU.

    queries in HBM:  chunk 0 ....  chunk 1 ..  chunk 2 ...      each at a multiple of 16 rows
    a block: BQ tokens of one chunk, all heads     row g * BQ + t of a head: token t, query head g
    blocks:  chunk 0: block block block | chunk 1: block | ...        shared by the cores of a chip
    a block walks over its sequence's cached tokens, C at a time:

    step i:  start the pages of the next C tokens (this block's, or the next block's first)
             wait for these, attend

so that only the very first copies of a call are waited for idly. The queries of the next block and
the page ids of its sequence come while a block is attended; of the results, only whole groups of 16
rows that hold a real token are copied back, as the rows behind may be another core's. Each KV head
is a matrix product of its own: with BQ * G rows, the unit is busy without the pairs of decode.
8-bit keys and values are widened to bfloat16 here, once for all the rows.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from octavo.pallas_kernels.attention.batch import RaggedBatch
from octavo.pallas_kernels.attention.tpu_layout import LANES, Layout, divide

MASKED = -1e30
LOG2E = 1.4426950408889634
IDS = 128  # SMEM copies come in multiples of 512 bytes
ALIGN = 16  # rows of a tile of 16-bit queries: where copies may begin
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
    layer: Any,  # i32[1]
    share: Any,  # i32[cores + 1] each core's first block, and their end
    slot_of: Any,  # i32[NB] the block's row of the table
    begin: Any,  # i32[NB] position of its first token
    end: Any,  # i32[NB] position after its last real token
    first: Any,  # i32[NB] the first C tokens that it sees
    base: Any,  # i32[NB] walk steps of the blocks before it
    row: Any,  # i32[NB] where its tokens lie among the queries
    q_hbm: Any,  # HBM [K, G, rows, W]
    table: Any,  # HBM i32[R, M'] page ids, M' a multiple of IDS
    sinks: Any,  # VMEM f32[K, G, LANES]
    pages: Any,  # HBM [L, P, tiles, S, W]
    out_hbm: Any,  # HBM [K, G, rows, W]
    buffer: Any,  # VMEM [2, tiles, C, W]
    ids: Any,  # SMEM i32[2, M']
    q: Any,  # VMEM [2, K, M, W]
    out: Any,  # VMEM [2, K, M, W]
    m: Any,  # VMEM f32[K, M, LANES]
    norm: Any,
    acc: Any,  # VMEM f32[K, M, W]
    page_sem: Any,
    id_sem: Any,
    q_sem: Any,
    out_sem: Any,
    *,
    layout: Layout,
    BQ: int,
    window: int,
    softcap: float,
    sunk: bool,
) -> None:
    core = pl.program_id(0)
    start, stop = share[core], share[core + 1]
    S, C = pages.shape[3], buffer.shape[2]
    per, shift = C // S, S.bit_length() - 1
    M = q.shape[2]
    narrow = jnp.dtype(buffer.dtype).itemsize == 1

    def id_copy(b: Any) -> Any:
        return pltpu.make_async_copy(table.at[slot_of[b]], ids.at[b % 2], id_sem)

    def fetch(b: Any) -> None:
        id_copy(b).start()
        for copy in q_copies(b):
            copy.start()

    def q_copies(b: Any) -> list[Any]:
        at = pl.ds(pl.multiple_of(row[b], ALIGN), BQ)
        return [
            pltpu.make_async_copy(
                q_hbm.at[:, g, at], q.at[b % 2, :, pl.ds(g * BQ, BQ)], q_sem.at[b % 2]
            )
            for g in range(layout.group)
        ]

    def each_out(b: Any, act: Any) -> None:
        """What the block has of real tokens, in a few copies of static sizes."""

        def some(before: Any, count: int) -> None:
            skip = pl.multiple_of(before * ALIGN, ALIGN)
            for g in range(layout.group):
                mine = out.at[b % 2, :, pl.ds(g * BQ + skip, count * ALIGN)]
                to = out_hbm.at[:, g, pl.ds(pl.multiple_of(row[b] + skip, ALIGN), count * ALIGN)]
                act(pltpu.make_async_copy(mine, to, out_sem.at[b % 2]))

        _in_powers((end[b] - begin[b] + ALIGN - 1) // ALIGN, BQ // ALIGN, some)

    def count(b: Any, c: Any) -> Any:
        return jnp.clip((end[b] - c * C + S - 1) >> shift, 0, per)

    def start_pages(b: Any, c: Any, side: Any) -> None:
        def one(j: Any, _: None) -> None:
            into = buffer.at[side, :, pl.ds(pl.multiple_of(j * S, S), S)]
            source = pages.at[layer[0], ids[b % 2, c * per + j]]
            pltpu.make_async_copy(source, into, page_sem.at[side]).start()

        jax.lax.fori_loop(0, count(b, c), one, None)

    def wait_pages(b: Any, c: Any, side: Any) -> None:
        def some(before: Any, count: int) -> None:
            part = buffer.at[side, :, pl.ds(0, count * S)]
            pltpu.make_async_copy(part, part, page_sem.at[side]).wait()

        _in_powers(count(b, c), per, some)

    def attend(b: Any, c: Any, side: Any, masked: bool) -> None:
        def rows(h: Any, k: Any, v: Any, at: int) -> None:
            """A part of a head's rows, so that one part's softmax hides another's products."""
            part = min(PART, M - at)
            mine = pl.ds(at, part)
            s = _logits(q[b % 2, h, mine], k, softcap)
            if masked:
                s = jnp.where(_seen(s.shape, at, begin[b] - c * C, BQ, window), s, MASKED)
            _add(m.at[h, mine], norm.at[h, mine], acc.at[h, mine], s, v)

        def head(h: Any, _: None) -> None:
            k, v = buffer[side, h], buffer[side, h if layout.shared else layout.kv_heads + h]
            if narrow:
                k, v = k.astype(jnp.bfloat16), v.astype(jnp.bfloat16)
            for at in range(0, M, PART):
                rows(h, k, v, at)

        jax.lax.fori_loop(0, layout.kv_heads, head, None)

    def step(b: Any, i: Any, steps: Any) -> None:
        c, side = first[b] + i, (base[b] + i) % 2
        pl.when(i + 1 < steps)(lambda: start_pages(b, c + 1, 1 - side))

        @pl.when((i + 1 == steps) & (b + 1 < stop))
        def _() -> None:
            id_copy(b + 1).wait()
            start_pages(b + 1, first[b + 1], 1 - side)

        wait_pages(b, c, side)
        clear = (c + 1) * C <= begin[b] + 1  # all of it lies before every token
        if window:
            clear &= c * C > begin[b] + BQ - 1 - window
        pl.when(clear)(lambda: attend(b, c, side, masked=False))
        pl.when(~clear)(lambda: attend(b, c, side, masked=True))

    def block(b: Any, _: None) -> None:
        pl.when(b + 1 < stop)(lambda: fetch(b + 1))
        for g in range(layout.group):
            mine = pl.ds(g * BQ, BQ)
            m[:, mine] = jnp.broadcast_to(sinks[:, g : g + 1], (layout.kv_heads, BQ, LANES))
        norm[...] = jnp.full_like(norm, float(sunk))
        acc[...] = jnp.zeros_like(acc)
        for copy in q_copies(b):
            copy.wait()
        steps = (end[b] - 1) // C - first[b] + 1
        jax.lax.fori_loop(0, steps, lambda i, _: step(b, i, steps), None)
        pl.when(b >= start + 2)(lambda: each_out(b - 2, lambda copy: copy.wait()))
        out[b % 2] = (acc[...] / norm[...][..., :1]).astype(out.dtype)
        each_out(b, lambda copy: copy.start())

    @pl.when(start < stop)
    def _() -> None:
        fetch(start)
        # What was never written may be no number, and 0 times that is none either.
        buffer[...] = jnp.zeros_like(buffer)
        id_copy(start).wait()
        start_pages(start, first[start], base[start] % 2)

    jax.lax.fori_loop(start, stop, block, None)
    for b in (stop - 2, stop - 1):
        pl.when(b >= start)(functools.partial(each_out, b, lambda copy: copy.wait()))


def _in_powers(count: Any, most: int, act: Any) -> None:
    """Any number of things up to `most` in a few acts of static sizes: act(how many before, n)."""
    while most:
        pl.when((count & most) != 0)(functools.partial(act, count & -(2 * most), most))
        most //= 2


def _logits(q: Any, k: Any, softcap: float) -> Any:
    """f32[rows, C] of q [rows, W], scaled for base 2, and k [C, W]."""
    dims = (((1,), (1,)), ((), ()))
    s = jax.lax.dot_general(q, k, dims, preferred_element_type=jnp.float32)
    return (softcap * LOG2E) * jnp.tanh(s * (1 / (softcap * LOG2E))) if softcap else s


def _seen(shape: tuple[int, ...], at: int, ahead: Any, BQ: int, window: int) -> Any:
    """bool[rows, C]: which tokens rows `at` and on see; the first row's is `ahead` of them."""
    row = jax.lax.broadcasted_iota(jnp.int32, shape, 0) + at
    behind = ahead + (row & (BQ - 1))
    behind -= jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    return (behind >= 0) & (behind < window) if window else behind >= 0


def _add(m: Any, norm: Any, acc: Any, s: Any, v: Any) -> None:
    """The softmax of logits s [rows, C] (of base 2) times v [C, W] joins what the rows had."""
    before = m[...]
    peak = jnp.maximum(before, jnp.max(s, axis=-1, keepdims=True))
    p = jnp.exp2(s - peak[:, :1])
    decay = jnp.exp2(before - peak)
    m[...] = peak
    norm[...] = norm[...] * decay + jnp.sum(p, axis=-1, keepdims=True)
    y = jnp.dot(p.astype(v.dtype), v, preferred_element_type=jnp.float32)
    acc[...] = acc[...] * decay[:, :1] + y


def _plan(
    batch: RaggedBatch, T: int, BQ: int, C: int, window: int, cores: int
) -> tuple[jax.Array, ...]:
    """The kernel's SMEM arrays after the layer; then i32[rows] the chunk token of each row of
    queries, and i32[T] the row of each chunk token. A chunk begins at a multiple of ALIGN rows."""
    start, size = batch.chunk_start, batch.chunk_count
    entries = start.shape[0]
    blocks = (size + BQ - 1) // BQ
    ends = jnp.cumsum(blocks)
    block = jnp.arange(T // BQ + entries, dtype=jnp.int32)
    chunk = jnp.minimum(jnp.sum(block[:, None] >= ends[None], axis=1), entries - 1)
    t = (block - (ends - blocks)[chunk]) * BQ  # the block's first token in its chunk
    begin = start[chunk] + t
    end = start[chunk] + jnp.minimum(size[chunk], t + BQ)
    first = jnp.maximum(begin - window + 1, 0) // C if window else jnp.zeros_like(begin)
    steps = jnp.where(block < ends[-1], (end - 1) // C - first + 1, 0)
    base = jnp.cumsum(steps) - steps
    taken = (size + ALIGN - 1) // ALIGN * ALIGN
    upto = jnp.cumsum(taken)
    most = -(-(T + (ALIGN - 1) * min(entries, T)) // ALIGN) * ALIGN + BQ  # a block may reach past
    row = jnp.arange(most, dtype=jnp.int32)
    owner = jnp.minimum(jnp.sum(row[:, None] >= upto[None], axis=1), entries - 1)
    tokens = batch.chunk_offset[owner] + row - (upto - taken)[owner]
    token = jnp.arange(T, dtype=jnp.int32)
    mine = jnp.sum(token[:, None] >= (batch.chunk_offset + size)[None], axis=1)
    mine = jnp.minimum(mine, entries - 1)
    rows = (upto - taken)[mine] + token - batch.chunk_offset[mine]
    at = (upto - taken)[chunk] + t
    share = divide(steps, ends[-1], cores)
    smem = (share, batch.chunk_slot[chunk], begin, end, first, base, at)
    return (
        *(array.astype(jnp.int32) for array in smem),
        jnp.clip(tokens, 0, T - 1),
        jnp.clip(rows, 0, most - 1),
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
    sinks: jax.Array | None = None,
    factor: jax.Array | None = None,
    cores: int = 1,
    interpret: Any = False,
) -> jax.Array:
    """What the T chunk tokens q [T, H, D] attend to, over pages that hold them already.

    pages [L, P, tiles, S, W], layer i32[]. sinks f32[H]; factor f32[H] multiplies the queries.
    `cores` share the blocks.

    Returns y [T, H, D] in the dtype of q; zeros for tokens of no chunk.
    """
    T, H, D = q.shape
    K, G, W = layout.kv_heads, layout.group, layout.width
    BQ, S = block_tokens(G), pages.shape[3]
    C = chunk_tokens(layout, S, pages.dtype.itemsize)
    *smem, tokens, rows = _plan(batch, T, BQ, C, window, cores)
    N, M = tokens.shape[0], BQ * G
    kind = jnp.bfloat16 if pages.dtype.itemsize == 1 else pages.dtype
    by = scale * LOG2E if factor is None else (scale * LOG2E) * factor[:, None]
    scaled = (q.astype(jnp.float32) * by).astype(kind)
    spread = scaled[tokens].reshape(N, K, G, D).transpose(1, 2, 0, 3)
    spread = jnp.pad(spread, [(0, 0)] * 3 + [(0, W - D)])
    table = jnp.pad(batch.table, [(0, 0), (0, -batch.table.shape[1] % IDS)])
    begin = jnp.full(H, MASKED) if sinks is None else sinks.astype(jnp.float32) * LOG2E
    begin = jnp.broadcast_to(begin.reshape(K, G, 1), (K, G, LANES))
    hbm, smem_spec = pl.BlockSpec(memory_space=pl.ANY), pl.BlockSpec(memory_space=pltpu.SMEM)
    static: dict[str, Any] = dict(layout=layout, BQ=BQ, window=window, softcap=softcap)
    out = pl.pallas_call(
        functools.partial(_kernel, sunk=sinks is not None, **static),
        name="tpu_prefill",
        grid=(cores,),
        in_specs=[smem_spec] * 8 + [hbm, hbm, pl.BlockSpec(memory_space=pltpu.VMEM), hbm],
        out_specs=hbm,
        scratch_shapes=[
            pltpu.VMEM((2, layout.tiles, C, W), pages.dtype),
            pltpu.SMEM((2, table.shape[1]), jnp.int32),
            pltpu.VMEM((2, K, M, W), kind),
            pltpu.VMEM((2, K, M, W), q.dtype),
            pltpu.VMEM((K, M, LANES), jnp.float32),
            pltpu.VMEM((K, M, LANES), jnp.float32),
            pltpu.VMEM((K, M, W), jnp.float32),
            pltpu.SemaphoreType.DMA((2,)),
            pltpu.SemaphoreType.DMA,
            pltpu.SemaphoreType.DMA((2,)),
            pltpu.SemaphoreType.DMA((2,)),
        ],
        out_shape=jax.ShapeDtypeStruct(spread.shape, q.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",),
            disable_bounds_checks=True,
            vmem_limit_bytes=VMEM,
        ),
        interpret=interpret,
    )(layer.reshape(1), *smem, spread, table, begin, pages)
    heads = out[..., layout.value_lane : layout.value_lane + D]
    y = heads.transpose(2, 0, 1, 3).reshape(N, H, D)[rows]
    covered = jnp.arange(T) < jnp.sum(batch.chunk_count)
    return jnp.where(covered[:, None, None], y, 0)
