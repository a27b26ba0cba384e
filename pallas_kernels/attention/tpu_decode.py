"""Decode on a TPU: one new token for each of many rows, written and attended in one walk.

    row 0:  chunk 0  chunk 1  chunk 2 | row 1:  chunk 0 | row 2:  chunk 0  chunk 1 | ...
            ------------------------- one flat walk over all rows' chunks -------------------------

    step i:  start the page ids of item i + 4        HBM -> SMEM
             start the pages of item i + 3           HBM -> the buffer of slot (i + 3) % 4
             wait for the pages of item i, attend

Four buffers have names of their own, so that the compiler sees that the copies into one and the
reads of another never meet: the scalar work of starting page copies (some 16 a chunk where pages
are small) then shares its instruction bundles with the arithmetic. Copies are not checked for
bounds, page ids come from the engine's own table: with the checks, 16-token pages cost seven times
as much.

8-bit keys and values are never unpacked. The few query rows are split into two 8-bit rows instead,
x = hi + lo / 16 or / 254, and so are the probabilities: about as exact as bfloat16.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from octavo.pallas_kernels.attention.tpu_layout import LANES, Layout

SLOTS = 4  # chunks in flight, one of them being attended to
RING = 2 * SLOTS
# What the walk keeps of an item: the place of its row among the rows to visit, its chunk, the row,
# the row's length, whether the row begins with it, its pages.
RANK, CHUNK, ROW, END, BEGINS, COUNT = range(6)
MASKED = -1e30
BUFFER = 4 << 20  # the most bytes of one of the buffers
VMEM = 48 << 20  # v5p and tpu7x have 64 MiB a core
LOG2E = 1.4426950408889634
IDS = 128  # page ids that one copy brings: the least that SMEM copies take is 512 bytes


def chunk_tokens(layout: Layout, page_size: int, dtype: jax.typing.DTypeLike) -> int:
    """C tokens that are attended to at once: large enough to amortize, small for short rows."""
    itemsize = jnp.dtype(dtype).itemsize
    size = 512 if itemsize > 1 else 1024
    while size > LANES and layout.tiles * size * layout.width * itemsize > BUFFER:
        size //= 2
    return max(size, page_size)


def split(x: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array, float]:
    """hi, lo and the factor of lo, both of an 8-bit dtype, for f32 x within its range."""
    if jnp.issubdtype(dtype, jnp.integer):
        hi, factor = jnp.round(x), 254.0
        return hi.astype(dtype), jnp.round((x - hi) * factor).astype(dtype), 1 / factor
    hi = x.astype(dtype)
    return hi, ((x - hi.astype(jnp.float32)) * 16).astype(dtype), 1 / 16


def most(dtype: Any) -> float:
    """What |x| is scaled to before it is split."""
    return 127.0 if jnp.issubdtype(dtype, jnp.integer) else 256.0


def _dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """f32 product; 8-bit integers sum exactly in i32."""
    kind = jnp.int32 if jnp.issubdtype(a.dtype, jnp.integer) else jnp.float32
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=kind).astype(jnp.float32)


@dataclass(frozen=True)
class _Walk:
    """The flat walk over all rows' chunks: its cursors, and every copy. Fields as in `_kernel`."""

    order: Any
    first: Any
    length: Any
    dest: Any
    table: Any
    q_hbm: Any
    unit_hbm: Any
    new_hbm: Any
    out_hbm: Any
    pages: Any
    buffers: Any
    ids: Any
    ring: Any
    q: Any
    unit: Any
    new: Any
    out: Any
    page_sem: Any
    id_sem: Any
    row_sem: Any
    out_sem: Any
    write_sem: Any
    tiles: int
    C: int  # tokens of a chunk
    S: int  # tokens of a page
    rows: Any  # to visit
    total: Any  # chunks
    layer: Any

    @property
    def per(self) -> int:
        """Pages of a chunk."""
        return self.C // self.S

    @property
    def shift(self) -> int:
        return self.S.bit_length() - 1

    @property
    def dtype(self) -> Any:
        return self.buffers[0].dtype

    @property
    def small(self) -> bool:
        return jnp.dtype(self.dtype).itemsize == 1

    def item(self, what: int, i: Any) -> Any:
        return self.ring[what, i & (RING - 1)]

    def id_copy(self, i: Any, slot: int) -> Any:
        at = (self.item(CHUNK, i) * self.per) & -IDS
        source = self.table.at[self.item(ROW, i), pl.ds(pl.multiple_of(at, IDS), IDS)]
        return pltpu.make_async_copy(source, self.ids.at[slot], self.id_sem.at[slot])

    def start_ids(self, i: Any, slot: int) -> None:
        """Place the cursor of item i and fetch its page ids; past the last item, any."""
        at, before = i & (RING - 1), (i - 1) & (RING - 1)
        n, c = self.ring[RANK, before], self.ring[CHUNK, before] + 1
        over = c * self.C >= self.ring[END, before]
        n = jnp.where(over, n + 1, n)
        row = self.order[jnp.minimum(n, self.order.shape[0] - 1)]
        c, end = jnp.where(over, self.first[row], c), self.length[row]
        left = jnp.minimum((end - c * self.C + self.S - 1) >> self.shift, self.per)
        count = jnp.where(i < self.total, left, 0)
        kept = {RANK: n, CHUNK: c, ROW: row, END: end, BEGINS: over.astype(jnp.int32), COUNT: count}
        for what, value in kept.items():
            self.ring[what, at] = value
        self.id_copy(i, slot).start()

    def start_pages(self, i: Any, slot: int) -> None:
        self.id_copy(i, slot).wait()
        n, base = self.item(COUNT, i), (self.item(CHUNK, i) * self.per) & (IDS - 1)
        for j in range(self.per):

            @pl.when(j < n)
            def _(j: int = j) -> None:
                page = self.pages.at[self.layer, self.ids[slot, base + j]]
                into = self.buffers[slot].at[:, pl.ds(j * self.S, self.S)]
                pltpu.make_async_copy(page, into, self.page_sem.at[slot]).start()

    def wait_pages(self, i: Any, slot: int) -> None:
        def wait(count: int) -> None:
            part = self.buffers[slot].at[:, pl.ds(0, count * self.S)]
            pltpu.make_async_copy(part, part, self.page_sem.at[slot]).wait()

        n = self.item(COUNT, i)
        pl.when(n == self.per)(lambda: wait(self.per))

        @pl.when(n < self.per)
        def _() -> None:
            bit = self.per // 2
            while bit:  # any number of pages in a few waits of static sizes
                pl.when((n & bit) != 0)(functools.partial(wait, bit))
                bit //= 2

    def row_copies(self, n: Any) -> list[Any]:
        row, side = self.order[jnp.minimum(n, self.order.shape[0] - 1)], n & 1
        pairs = [(self.q_hbm, self.q), (self.new_hbm, self.new), (self.unit_hbm, self.unit)]
        return [
            pltpu.make_async_copy(source.at[row], into.at[side], self.row_sem.at[k, side])
            for k, (source, into) in enumerate(pairs if self.small else pairs[:2])
        ]

    def start_row(self, n: Any) -> None:
        @pl.when(n < self.rows)
        def _() -> None:
            for copy in self.row_copies(n):
                copy.start()

    def out_copy(self, n: Any) -> Any:
        row = self.order[jnp.clip(n, 0, self.order.shape[0] - 1)]
        return pltpu.make_async_copy(
            self.out.at[n & 1], self.out_hbm.at[row], self.out_sem.at[n & 1]
        )

    def write_back(self, i: Any, slot: int) -> Any:
        at = self.dest[self.item(ROW, i)]
        inside = (self.item(END, i) - 1 - self.item(CHUNK, i) * self.C) >> self.shift
        part = self.buffers[slot].at[:, pl.ds(pl.multiple_of(inside * self.S, self.S), self.S)]
        page = self.pages.at[self.layer, at >> self.shift]
        return pltpu.make_async_copy(part, page, self.write_sem.at[slot])

    def merge(self, i: Any, slot: int) -> None:
        """Put the new token into its page, here and in HBM."""
        side, position = self.item(RANK, i) & 1, self.item(END, i) - 1
        page = (position - self.item(CHUNK, i) * self.C) >> self.shift
        at = pl.multiple_of(page << self.shift, self.S)
        for tile in range(self.tiles):
            old = self.buffers[slot][tile, pl.ds(at, self.S)]
            here = jax.lax.broadcasted_iota(jnp.int32, old.shape, 0) == (position & (self.S - 1))
            row = self.new[side, tile, :][None]
            merged = jnp.where(here, row.astype(jnp.float32), old.astype(jnp.float32))
            self.buffers[slot][tile, pl.ds(at, self.S)] = merged.astype(self.dtype)
        self.write_back(i, slot).start()


def _kernel(
    # SMEM
    walk: Any,  # i32[3] rows to visit, chunks in all, the layer
    order: Any,  # i32[R] the rows to visit
    first: Any,  # i32[R] the first chunk that a row sees
    length: Any,  # i32[R] tokens with the new one
    dest: Any,  # i32[R] page * S + offset of the new token
    # HBM
    table: Any,  # i32[R, M'] page ids, M' a multiple of IDS
    q_hbm: Any,  # [R, units, rows or 2 rows, lanes]
    unit_hbm: Any,  # f32[R, units * rows, LANES] what a query row was divided by
    new_hbm: Any,  # [R, tiles, W]
    pages_in: Any,  # [L, P, tiles, S, W], aliased with `pages`
    out_hbm: Any,  # [R, units, rows, lanes]
    pages: Any,
    *scratch: Any,
    layout: Layout,
    C: int,
    S: int,
    window: int,
    softcap: float,
) -> None:
    buffers, rest = scratch[:SLOTS], scratch[SLOTS:]
    ids, ring, q, unit, new, out, m, norm, acc, sems = rest
    page_sem, id_sem, row_sem, out_sem, write_sem = (sems.at[kind] for kind in range(5))
    del pages_in
    rows, total = walk[0], walk[1]
    smem = (order, first, length, dest)
    hbm = (table, q_hbm, unit_hbm, new_hbm, out_hbm, pages)
    here = (buffers, ids, ring, q, unit, new, out)
    sem = (page_sem.at[0], id_sem.at[0], row_sem, out_sem.at[0], write_sem.at[0])
    w = _Walk(*smem, *hbm, *here, *sem, layout.tiles, C, S, rows, total, walk[2])
    per, dtype, small, R = w.per, w.dtype, w.small, layout.rows

    def attend(i: Any, slot: int) -> None:
        side, start, end = w.item(RANK, i) & 1, w.item(CHUNK, i) * C, w.item(END, i)
        j = jax.lax.broadcasted_iota(jnp.int32, (R, C), 1) + start
        seen = j < end
        if window:
            seen &= j > end - 1 - window
        logits = []
        for u in range(layout.units):
            k = jnp.concatenate([buffers[slot][t] for t in layout.key_tiles(u)], axis=-1)
            s = _dot(q[side, u], k, (1, 1))
            if small:
                s = s[:R] + s[R:] * split(jnp.zeros(()), dtype)[2]
                s = s * unit[side, u * R : (u + 1) * R, :1]
            if softcap:
                s = (softcap * LOG2E) * jnp.tanh(s * (1 / (softcap * LOG2E)))
            logits.append(jnp.where(seen, s, MASKED))
        for u, s in enumerate(logits):
            before = m[u]
            peak = jnp.maximum(before, jnp.max(s, axis=-1, keepdims=True))
            p = jnp.exp2(s - peak[:, :1])
            decay = jnp.exp2(before - peak)
            norm[u] = norm[u] * decay + jnp.sum(p, axis=-1, keepdims=True)
            m[u] = peak
            v = jnp.concatenate([buffers[slot][t] for t in layout.value_tiles(u)], axis=-1)
            if small:
                hi, lo, factor = split(p * most(dtype), dtype)
                y = _dot(jnp.concatenate([hi, lo]), v, (1, 0))
                y = y[:R] + y[R:] * factor
            else:
                y = _dot(p.astype(dtype), v, (1, 0))
            acc[u] = acc[u] * decay[:, :1] + y

    def step(i: Any, slot: int) -> None:
        n, before = w.item(RANK, i), (slot - 1) % SLOTS
        last = w.item(BEGINS, i + 1) != 0

        @pl.when(w.item(BEGINS, i) != 0)
        def _() -> None:
            @pl.when(i > 0)
            def _() -> None:  # its buffer is about to be filled again
                w.write_back(i - 1, before).wait()

            for copy in w.row_copies(n):
                copy.wait()
            w.start_row(n + 1)
            m[...] = jnp.full_like(m, MASKED)
            norm[...] = jnp.zeros_like(norm)
            acc[...] = jnp.zeros_like(acc)

        w.wait_pages(i, slot)
        pl.when(last)(lambda: w.merge(i, slot))
        # One block of instructions from here, so that these copies start beside the arithmetic.
        w.start_pages(i + SLOTS - 1, before)
        w.start_ids(i + SLOTS, slot)
        attend(i, slot)

        @pl.when(last)
        def _() -> None:
            pl.when(n >= 2)(lambda: w.out_copy(n - 2).wait())
            scale = 1 / most(dtype) if small else 1.0
            y = acc[...] * (scale / norm[...][..., :1])
            out[n & 1] = y.astype(out.dtype)
            w.out_copy(n).start()

    # Before the first item, a cursor that the first step of the walk moves to row 0.
    ring[RANK, RING - 1] = -1
    ring[CHUNK, RING - 1] = -1
    ring[END, RING - 1] = 0
    w.start_row(jnp.int32(0))
    for i in range(SLOTS):
        w.start_ids(jnp.int32(i), i)

        @pl.when((i < total) & (w.item(COUNT, i) < per))
        def _(i: int = i) -> None:  # what was never written may be no number, and 0 times that too
            values = [tile for u in range(layout.units) for tile in layout.value_tiles(u)]
            for tile in dict.fromkeys(values):
                buffers[i][tile] = jnp.zeros_like(buffers[i][tile])

    for i in range(SLOTS - 1):
        w.start_pages(jnp.int32(i), i)

    def turn(g: Any, _: None) -> None:
        for slot in range(SLOTS):
            i = g * SLOTS + slot

            @pl.when(i < total)
            def _(i: Any = i, slot: int = slot) -> None:
                step(i, slot)

    jax.lax.fori_loop(0, (total + SLOTS - 1) // SLOTS, turn, None)

    for slot in range(SLOTS):

        @pl.when((total > 0) & ((total - 1) & (SLOTS - 1) == slot))
        def _(slot: int = slot) -> None:
            w.write_back(total - 1, slot).wait()

        @pl.when((total + SLOTS - 1) & (SLOTS - 1) == slot)
        def _(slot: int = slot) -> None:  # the page ids of an item that is not there
            w.id_copy(total + SLOTS - 1, slot).wait()

    for back in (2, 1):

        @pl.when(rows >= back)
        def _(back: int = back) -> None:
            w.out_copy(rows - back).wait()


def plan(
    length: jax.Array, active: jax.Array, C: int, window: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """walk i32[2], order i32[R], first i32[R]: the same for every layer of a group."""
    rank = jnp.cumsum(active.astype(jnp.int32)) - 1
    R = length.shape[0]
    order = (
        jnp.zeros(R, jnp.int32)
        .at[jnp.where(active, rank, R)]
        .set(jnp.arange(R, dtype=jnp.int32), mode="drop")
    )
    first = jnp.maximum(length - window, 0) // C if window else jnp.zeros_like(length)
    chunks = jnp.where(active, -(-length // C) - first, 0)
    walk = jnp.stack([jnp.sum(active, dtype=jnp.int32), jnp.sum(chunks, dtype=jnp.int32)])
    return walk, order, first


@functools.partial(
    jax.jit, static_argnames=("layout", "window", "scale", "softcap", "chunk", "interpret")
)
def decode(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    pages: jax.Array,
    layer: jax.Array,
    table: jax.Array,
    length: jax.Array,
    active: jax.Array,
    dest: jax.Array,
    *,
    layout: Layout,
    window: int,
    scale: float,
    softcap: float,
    chunk: int = 0,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """Write one token a row and attend to it and all before it.

    q [R, H, D], k and v [R, K, D], pages [L, P, tiles, S, W], layer i32[], table i32[R, M], length
    i32[R] with the new token, active bool[R], dest i32[R] = page * S + offset. Returns y [R, H, D],
    zeros where a row is not active, and the pages.
    """
    S, dtype = pages.shape[3], pages.dtype
    C = max(S, chunk) if chunk else chunk_tokens(layout, S, dtype)
    small = dtype.itemsize == 1
    walk, order, first = plan(length, active, C, window)
    scaled = q.astype(jnp.float32) * (scale * LOG2E)
    rows = layout.queries(scaled)
    unit = jnp.ones((q.shape[0], layout.units * layout.rows, LANES), jnp.float32)
    if small:
        size = jnp.maximum(jnp.max(jnp.abs(rows), axis=-1, keepdims=True), 1e-20) / most(dtype)
        hi, lo, _ = split(rows / size, dtype)
        rows = jnp.concatenate([hi, lo], axis=2)
        unit = jnp.broadcast_to(size.reshape(size.shape[0], -1, 1), unit.shape)
    else:
        rows = rows.astype(dtype)
    new = layout.new_rows(k, v).astype(dtype)
    ids = jnp.pad(table, [(0, 0), (0, -table.shape[1] % IDS)])
    hbm, smem = pl.BlockSpec(memory_space=pl.ANY), pl.BlockSpec(memory_space=pltpu.SMEM)
    shape = (layout.units, layout.rows)
    out, pages = pl.pallas_call(
        functools.partial(_kernel, layout=layout, C=C, S=S, window=window, softcap=softcap),
        name="tpu_decode",
        in_specs=[smem] * 5 + [hbm] * 5,
        out_specs=[hbm, hbm],
        out_shape=[
            jax.ShapeDtypeStruct((q.shape[0], *shape, layout.lanes), q.dtype),
            jax.ShapeDtypeStruct(pages.shape, dtype),
        ],
        input_output_aliases={9: 1},
        scratch_shapes=[
            *[pltpu.VMEM((layout.tiles, C, layout.width), dtype)] * SLOTS,
            pltpu.SMEM((SLOTS, IDS), jnp.int32),
            pltpu.SMEM((6, RING), jnp.int32),
            pltpu.VMEM((2, *rows.shape[1:]), dtype),
            pltpu.VMEM((2, *unit.shape[1:]), jnp.float32),
            pltpu.VMEM((2, *new.shape[1:]), dtype),
            pltpu.VMEM((2, *shape, layout.lanes), q.dtype),
            pltpu.VMEM((*shape, LANES), jnp.float32),
            pltpu.VMEM((*shape, LANES), jnp.float32),
            pltpu.VMEM((*shape, layout.lanes), jnp.float32),
            pltpu.SemaphoreType.DMA((5, 3, SLOTS)),
        ],
        compiler_params=pltpu.CompilerParams(disable_bounds_checks=True, vmem_limit_bytes=VMEM),
        interpret=interpret,
    )(
        jnp.append(walk, layer),
        order,
        first,
        length,
        dest,
        ids,
        rows,
        unit,
        new,
        pages,
    )
    return jnp.where(active[:, None, None], layout.heads(out), 0), pages
