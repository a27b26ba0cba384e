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

from octavo.pallas_kernels.attention.tpu_layout import LANES, Layout, divide

SLOTS = 4  # chunks in flight, one of them being attended to
RING = 2 * SLOTS
# What the walk keeps of an item: the place of its row among the rows to visit, its chunk, the row,
# the row's length, whether the row begins with it, its pages.
RANK, CHUNK, ROW, END, BEGINS, COUNT = range(6)
MASKED = -1e30
TOGETHER = 64  # tokens
BUFFER = 4 << 20  # the most bytes of one of the buffers
VMEM = 48 << 20  # v5p and tpu7x have 64 MiB a core
LOG2E = 1.4426950408889634
IDS = 128  # page ids that one copy brings: the least that SMEM copies take is 512 bytes


def chunk_tokens(layout: Layout, page_size: int, dtype: jax.typing.DTypeLike, longest: int) -> int:
    """C tokens that are attended to at once: many where they are small, so that the arithmetic of
    one hides the latency of another; few where no row has more than `longest` tokens."""
    token = layout.tiles * layout.width * jnp.dtype(dtype).itemsize
    size = 2048 if token <= BUFFER // 4096 else 1024
    while size > LANES and (size * token > BUFFER or size > max(512, longest // 4)):
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
    layer: Any
    begin: Any  # the first of the rows to visit that is this core's
    rows: Any  # the end of this core's
    total: Any  # chunks of this core's rows

    @property
    def per(self) -> int:
        """Pages of a chunk."""
        return self.C // self.S

    @property
    def together(self) -> int:
        """Pages that are copied on one condition: small ones in fours, which costs less than the
        conditions. What lies past a row's last page in its table is page 0, trash."""
        return max(1, min(self.per, TOGETHER // self.S))

    @property
    def shift(self) -> int:
        return self.S.bit_length() - 1

    @property
    def dtype(self) -> Any:
        return self.buffers[0].dtype

    @property
    def small(self) -> bool:
        """The products are of 8 bits; else pages of 8 bits are widened first."""
        return jnp.dtype(self.q.dtype).itemsize == 1

    def item(self, what: int, i: Any) -> Any:
        return self.ring[what, i & (RING - 1)]

    def id_copy(self, i: Any, slot: int) -> Any:
        at = (self.item(CHUNK, i) * self.per) & -IDS
        source = self.table.at[self.item(ROW, i), pl.ds(pl.multiple_of(at, IDS), IDS)]
        return pltpu.make_async_copy(source, self.ids[slot], self.id_sem.at[slot])

    def start_ids(self, i: Any, slot: int) -> None:
        """Place the cursor of item i and fetch its page ids; past the last item, any."""
        at, before = i & (RING - 1), (i - 1) & (RING - 1)
        n, c = self.ring[RANK, before], self.ring[CHUNK, before] + 1
        over = c * self.C >= self.ring[END, before]
        n = jnp.where(over, n + 1, n)
        row = self.order[jnp.minimum(n, self.order.shape[0] - 1)]
        c, end = jnp.where(over, self.first[row], c), self.length[row]
        left = (end - c * self.C + self.S - 1) >> self.shift
        left = jnp.minimum((left + self.together - 1) & -self.together, self.per)
        count = jnp.where(i < self.total, left, 0)
        kept = {RANK: n, CHUNK: c, ROW: row, END: end, BEGINS: over.astype(jnp.int32), COUNT: count}
        for what, value in kept.items():
            self.ring[what, at] = value
        self.id_copy(i, slot).start()

    def start_pages(self, i: Any, slot: int) -> None:
        self.id_copy(i, slot).wait()
        n, base = self.item(COUNT, i), (self.item(CHUNK, i) * self.per) & (IDS - 1)
        for first in range(0, self.per, self.together):
            group = range(first, first + self.together)
            found = [self.ids[slot][base + j] for j in group]  # loads on a condition cost more

            @pl.when(first < n)
            def _(group: range = group, found: list[Any] = found) -> None:
                for j, page_id in zip(group, found, strict=True):
                    page = self.pages.at[self.layer].at[page_id]
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
            while bit >= self.together:  # any number of pages in a few waits of static sizes
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
    walk: Any,  # i32[2 + 2 * cores] the layer, where each core's rows begin, their end, chunks
    order: Any,  # i32[R] the rows to visit
    first: Any,  # i32[R] the first chunk that a row sees
    length: Any,  # i32[R] tokens with the new one
    dest: Any,  # i32[R] page * S + offset of the new token
    # HBM
    table: Any,  # i32[R, M'] page ids, M' a multiple of IDS
    q_hbm: Any,  # [R, units, rows or 2 rows, lanes]
    unit_hbm: Any,  # f32[R, units * rows, LANES] what a query row was divided by
    new_hbm: Any,  # [R, tiles, W]
    sinks: Any,  # VMEM f32[units, rows, LANES]
    pages_in: Any,  # [L, P, tiles, S, W], aliased with `pages`
    out_hbm: Any,  # [R, units, rows, lanes]
    pages: Any,
    *scratch: Any,
    layout: Layout,
    C: int,
    S: int,
    window: int,
    softcap: float,
    cores: int,
    sunk: bool,
) -> None:
    buffers, ids, rest = scratch[:SLOTS], scratch[SLOTS : 2 * SLOTS], scratch[2 * SLOTS :]
    ring, q, unit, new, out, m, norm, acc, sems = rest
    page_sem, id_sem, row_sem, out_sem, write_sem = (sems.at[kind] for kind in range(5))
    del pages_in
    core = pl.program_id(0)
    share = (walk[0], walk[1 + core], walk[2 + core], walk[2 + cores + core])
    _, begin, rows, total = share
    smem = (order, first, length, dest)
    hbm = (table, q_hbm, unit_hbm, new_hbm, out_hbm, pages)
    here = (buffers, ids, ring, q, unit, new, out)
    sem = (page_sem.at[0], id_sem.at[0], row_sem, out_sem.at[0], write_sem.at[0])
    w = _Walk(*smem, *hbm, *here, *sem, layout.tiles, C, S, *share)
    per, dtype, small, R = w.per, w.dtype, w.small, layout.rows

    def operand(slot: int, tiles: list[int]) -> jax.Array:
        return jnp.concatenate([buffers[slot][t].astype(q.dtype) for t in tiles], axis=-1)

    def attend(i: Any, slot: int) -> None:
        side, start, end = w.item(RANK, i) & 1, w.item(CHUNK, i) * C, w.item(END, i)
        j = jax.lax.broadcasted_iota(jnp.int32, (R, C), 1) + start
        seen = j < end
        if window:
            seen &= j > end - 1 - window
        logits = []
        for u in range(layout.units):
            k = operand(slot, layout.key_tiles(u))
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
            v = operand(slot, layout.value_tiles(u))
            if small:
                hi, lo, factor = split(p * most(dtype), dtype)
                y = _dot(jnp.concatenate([hi, lo]), v, (1, 0))
                y = y[:R] + y[R:] * factor
            else:
                y = _dot(p.astype(q.dtype), v, (1, 0))
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
            m[...] = sinks[...]
            norm[...] = jnp.full_like(norm, float(sunk))
            acc[...] = jnp.zeros_like(acc)

        w.wait_pages(i, slot)
        pl.when(last)(lambda: w.merge(i, slot))
        # One block of instructions from here, so that these copies start beside the arithmetic.
        w.start_pages(i + SLOTS - 1, before)
        w.start_ids(i + SLOTS, slot)
        attend(i, slot)

        @pl.when(last)
        def _() -> None:
            pl.when(n >= begin + 2)(lambda: w.out_copy(n - 2).wait())
            scale = 1 / most(dtype) if small else 1.0
            y = acc[...] * (scale / norm[...][..., :1])
            out[n & 1] = y.astype(out.dtype)
            w.out_copy(n).start()

    # Before the first item, a cursor that the first step of the walk moves to the first row.
    ring[RANK, RING - 1] = begin - 1
    ring[CHUNK, RING - 1] = -1
    ring[END, RING - 1] = 0
    w.start_row(begin)
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

        @pl.when(rows >= begin + back)
        def _(back: int = back) -> None:
            w.out_copy(rows - back).wait()


def plan(
    length: jax.Array, active: jax.Array, C: int, window: int, cores: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """walk i32[1 + 2 * cores] but for the layer, order i32[R], first i32[R]: the same for every
    layer of a group. Each core gets rows one behind another, about as many chunks as the others."""
    rank = jnp.cumsum(active.astype(jnp.int32)) - 1
    R = length.shape[0]
    order = (
        jnp.zeros(R, jnp.int32)
        .at[jnp.where(active, rank, R)]
        .set(jnp.arange(R, dtype=jnp.int32), mode="drop")
    )
    first = jnp.maximum(length - window, 0) // C if window else jnp.zeros_like(length)
    chunks = jnp.where(active, -(-length // C) - first, 0)
    rows = jnp.sum(active, dtype=jnp.int32)
    visited = jnp.where(jnp.arange(R) < rows, chunks[order], 0)
    bounds = divide(visited, rows, cores)
    before = jnp.append(0, jnp.cumsum(visited))[bounds]
    return jnp.concatenate([bounds, before[1:] - before[:-1]]).astype(jnp.int32), order, first


@functools.partial(
    jax.jit,
    static_argnames=(
        *("layout", "window", "scale", "softcap", "cores", "widen", "chunk", "interpret"),
    ),
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
    sinks: jax.Array | None = None,
    factor: jax.Array | None = None,
    cores: int = 1,
    widen: bool = False,
    chunk: int = 0,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """Write one token a row and attend to it and all before it.

    q [R, H, D], k and v [R, K, D], pages [L, P, tiles, S, W], layer i32[], table i32[R, M], length
    i32[R] with the new token, active bool[R], dest i32[R] = page * S + offset. Returns y [R, H, D],
    zeros where a row is not active, and the pages. sinks f32[H]; factor f32[H] multiplies the
    queries. `cores` share the rows. `widen`: pages of 8 bits become bfloat16 before they are used.
    """
    S, dtype = pages.shape[3], pages.dtype
    C = max(S, chunk) if chunk else chunk_tokens(layout, S, dtype, table.shape[1] * S)
    small = dtype.itemsize == 1 and not widen
    walk, order, first = plan(length, active, C, window, cores)
    by = scale * LOG2E if factor is None else (scale * LOG2E) * factor[:, None]
    scaled = q.astype(jnp.float32) * by
    rows = layout.queries(scaled)
    unit = jnp.ones((q.shape[0], layout.units * layout.rows, LANES), jnp.float32)
    if small:
        size = jnp.maximum(jnp.max(jnp.abs(rows), axis=-1, keepdims=True), 1e-20) / most(dtype)
        hi, lo, _ = split(rows / size, dtype)
        rows = jnp.concatenate([hi, lo], axis=2)
        unit = jnp.broadcast_to(size.reshape(size.shape[0], -1, 1), unit.shape)
    else:
        rows = rows.astype(jnp.bfloat16 if widen else dtype)
    new = layout.new_rows(k, v).astype(dtype)
    ids = jnp.pad(table, [(0, 0), (0, -table.shape[1] % IDS)])
    hbm, smem = pl.BlockSpec(memory_space=pl.ANY), pl.BlockSpec(memory_space=pltpu.SMEM)
    shape = (layout.units, layout.rows)
    start = jnp.full((*shape, LANES), MASKED, jnp.float32)
    if sinks is not None:
        own = sinks.astype(jnp.float32).reshape(layout.units, -1, 1) * LOG2E
        start = start.at[:, : own.shape[1]].set(own)
    static: dict[str, Any] = dict(window=window, softcap=softcap, cores=cores)
    out, pages = pl.pallas_call(
        functools.partial(_kernel, layout=layout, C=C, S=S, sunk=sinks is not None, **static),
        name="tpu_decode",
        grid=(cores,),
        in_specs=[smem] * 5 + [hbm] * 4 + [pl.BlockSpec(memory_space=pltpu.VMEM), hbm],
        out_specs=[hbm, hbm],
        out_shape=[
            jax.ShapeDtypeStruct((q.shape[0], *shape, layout.lanes), q.dtype),
            jax.ShapeDtypeStruct(pages.shape, dtype),
        ],
        input_output_aliases={10: 1},
        scratch_shapes=[
            *[pltpu.VMEM((layout.tiles, C, layout.width), dtype)] * SLOTS,
            *[pltpu.SMEM((IDS,), jnp.int32)] * SLOTS,
            pltpu.SMEM((6, RING), jnp.int32),
            pltpu.VMEM((2, *rows.shape[1:]), rows.dtype),
            pltpu.VMEM((2, *unit.shape[1:]), jnp.float32),
            pltpu.VMEM((2, *new.shape[1:]), dtype),
            pltpu.VMEM((2, *shape, layout.lanes), q.dtype),
            pltpu.VMEM((*shape, LANES), jnp.float32),
            pltpu.VMEM((*shape, LANES), jnp.float32),
            pltpu.VMEM((*shape, layout.lanes), jnp.float32),
            pltpu.SemaphoreType.DMA((5, 3, SLOTS)),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), disable_bounds_checks=True, vmem_limit_bytes=VMEM
        ),
        interpret=interpret,
    )(
        jnp.append(layer, walk),
        order,
        first,
        length,
        dest,
        ids,
        rows,
        unit,
        new,
        start,
        pages,
    )
    return jnp.where(active[:, None, None], layout.heads(out), 0), pages
