"""Ragged paged attention in plain jnp, by blocks of keys: what runs on a CPU.

The definition is in reference.py. No token looks at its whole table: a block of about 128 keys is
gathered at a time and folded into a running softmax (largest logit m, sum l, weighted values acc),
which begins with the sink where a head has one. Scales of keys and values go to the few queries
and results instead:

    rows    all R decode rows together; the loop runs from the earliest block that any row's window
            still needs to the last block of the longest row

    chunks  one work item is up to `ROWS_PER_ITEM` tokens of one chunk; it runs from the first block
            that its first token sees to the block of its last token

                       keys of the slot ->
            item 0     [x]
            item 1     [x][x]             an item reaches past the end of its chunk where the chunk
            item 2     [x][x][x]          ends early; those rows belong to the next chunk, whose
                                          items come later and overwrite them

Trip counts are values on the device, so one program serves every length. Every index is in bounds
by construction: tables are padded with page 0, and queries with one spare item.

Memory beside the cache: two gathered blocks, R * K * 128 * D each, in float32.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from octavo.pallas_kernels.attention.batch import RaggedBatch
from octavo.pallas_kernels.attention.reference import KV, MASKED, floats, write

KEYS_PER_BLOCK = 128
ROWS_PER_ITEM = 64


class Running(NamedTuple):
    """The softmax so far, for queries [..., A, D]; all float32."""

    acc: jax.Array  # [..., A, D] sum of exp(logit - top) * v
    top: jax.Array  # [..., A] the largest logit
    total: jax.Array  # [..., A] sum of exp(logit - top)

    @staticmethod
    def empty(shape: tuple[int, ...], sinks: jax.Array | None) -> "Running":
        """No key yet. sinks [..., A], in any shape that broadcasts to this."""
        if sinks is None:
            return Running(jnp.zeros(shape), jnp.full(shape[:-1], MASKED), jnp.zeros(shape[:-1]))
        return Running(jnp.zeros(shape), jnp.broadcast_to(sinks, shape[:-1]), jnp.ones(shape[:-1]))

    def fold(
        self, q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array, softcap: float
    ) -> "Running":
        """Take in one block: q [..., A, D], k and v [..., n, D], seen bool[..., A, n].

        A block in which a query sees nothing adds garbage to a total whose `top` is MASKED; the
        first block in which it sees a key scales that away, as exp(MASKED - top) is 0.
        """
        logits = jnp.einsum("...ad,...nd->...an", q, k)
        if softcap:
            logits = softcap * jnp.tanh(logits / softcap)
        logits = jnp.where(seen, logits, MASKED)
        top = jnp.maximum(self.top, logits.max(-1))
        weight = jnp.exp(logits - top[..., None])
        shrink = jnp.exp(self.top - top)
        return Running(
            self.acc * shrink[..., None] + jnp.einsum("...an,...nd->...ad", weight, v),
            top,
            self.total * shrink + weight.sum(-1),
        )

    def result(self) -> jax.Array:
        """[..., A, D]; 0 for a query that met no block."""
        return self.acc / jnp.where(self.total == 0, 1, self.total)[..., None]


class Pages(NamedTuple):
    """The cache and the tables, cut into blocks of `span` keys."""

    k: jax.Array  # [P * K, S * D]
    v: jax.Array  # [P * K, S * D]
    table: jax.Array  # i32[R, M'] padded to whole blocks
    kv_heads: int
    per_block: int  # pages in a block
    span: int  # keys in a block
    head_size: int

    @staticmethod
    def of(cache: KV, table: jax.Array) -> "Pages":
        P, K, S, D = cache.k.shape
        per_block = max(1, min(KEYS_PER_BLOCK // S, table.shape[1]))
        padded = jnp.pad(table, ((0, 0), (0, -table.shape[1] % per_block)))
        # One long row per tile: XLA gathers those a third faster than tiles of [S, D].
        k, v = cache.k.reshape(P * K, S * D), cache.v.reshape(P * K, S * D)
        return Pages(k, v, padded, K, per_block, per_block * S, D)

    def block(self, pages: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys and values of pages i32[..., n], float32 [..., K, n * S, D]."""
        tiles = pages[..., None, :] * self.kv_heads + jnp.arange(self.kv_heads)[:, None]
        shape = (*tiles.shape[:-1], self.span, self.head_size)
        # The barriers keep indices out of the gathers' loops, and gathers out of the matmuls',
        # where they would be computed again for every element.
        tiles = jax.lax.optimization_barrier(tiles)

        def get(pool: jax.Array) -> jax.Array:
            return pool.at[tiles].get(mode="promise_in_bounds").reshape(shape)

        k, v = jax.lax.optimization_barrier((get(self.k), get(self.v)))
        return floats(k), floats(v)


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cache: KV,
    batch: RaggedBatch,
    *,
    window: int,
    scale: float,
    softcap: float,
    sinks: jax.Array | None = None,
    kv_scales: jax.Array | None = None,
) -> tuple[jax.Array, KV]:
    """Write, then attend. q [N, H, D], k and v [N, K, D] -> [N, H, D] in the dtype of q.

    R and T come from the shapes: N = R * Q + T. Either may be 0.
    """
    cache = write(cache, k, v, batch.dest, kv_scales)
    pages = Pages.of(cache, batch.table)
    N, H, D = q.shape
    K = k.shape[1]
    grouped = q.astype(jnp.float32).reshape(N, K, H // K, D) * scale
    if kv_scales is not None:
        grouped *= kv_scales[0][:, None, None]
    sinks = None if sinks is None else sinks.reshape(K, H // K)
    in_rows = batch.row_start.shape[0] * batch.tokens_per_row
    parts = []
    if in_rows:
        parts.append(_rows(grouped[:in_rows], pages, batch, window, softcap, sinks))
    if in_rows < N:
        parts.append(_chunks(grouped[in_rows:], pages, batch, window, softcap, sinks))
    y = parts[0] if len(parts) == 1 else jnp.concatenate(parts)
    if kv_scales is not None:
        y *= kv_scales[1][:, None, None]
    return y.reshape(N, H, D).astype(q.dtype), cache


def _rows(
    q: jax.Array,
    pages: Pages,
    batch: RaggedBatch,
    window: int,
    softcap: float,
    sinks: jax.Array | None,
) -> jax.Array:
    """Decode rows: q [R * Q, K, H / K, D] -> the same shape; sinks [K, H / K]."""
    _, K, G, D = q.shape
    Q = batch.tokens_per_row
    R = batch.row_start.shape[0]
    q = q.reshape(R, Q, K, G, D).swapaxes(1, 2).reshape(R, K, Q * G, D)
    position = batch.row_start[:, None] + jnp.arange(Q * G) // G  # [R, Q * G]
    idle = batch.row_count == 0
    last = batch.row_start + batch.row_count - 1
    stop = jnp.max(jnp.where(idle, 0, last // pages.span + 1))
    if window:
        earliest = jnp.maximum(batch.row_start - (window - 1), 0) // pages.span
        start = jnp.minimum(jnp.min(jnp.where(idle, stop, earliest)), stop)
    else:
        start = jnp.zeros_like(stop)

    def block(i: jax.Array, running: Running) -> Running:
        at = jax.lax.dynamic_slice_in_dim(pages.table, i * pages.per_block, pages.per_block, 1)
        k, v = pages.block(at)  # [R, K, span, D]
        seen = _seen(position, i * pages.span + jnp.arange(pages.span), window)
        return running.fold(q, k, v, seen[:, None], softcap)

    own = None if sinks is None else jnp.tile(sinks, (1, Q))
    y = jax.lax.fori_loop(start, stop, block, Running.empty(q.shape, own)).result()
    return y.reshape(R, K, Q, G, D).swapaxes(1, 2).reshape(R * Q, K, G, D)


def _chunks(
    q: jax.Array,
    pages: Pages,
    batch: RaggedBatch,
    window: int,
    softcap: float,
    sinks: jax.Array | None,
) -> jax.Array:
    """Chunk tokens: q [T, K, H / K, D] -> the same shape; sinks [K, H / K]."""
    T, K, G, D = q.shape
    size = min(ROWS_PER_ITEM, T)
    q = jnp.pad(q, ((0, size), (0, 0), (0, 0), (0, 0)))
    items = (batch.chunk_count + (size - 1)) // size  # [C]
    C = items.shape[0]
    own = None if sinks is None else jnp.tile(sinks, (1, size))
    end = jnp.tril(jnp.ones((C, C), jnp.int32)) @ items  # chunk c has items end[c-1] to end[c]

    def item(i: jax.Array, y: jax.Array) -> jax.Array:
        c = jnp.sum(i >= end)  # i < end[C - 1], so c < C
        done = (i - (end[c] - items[c])) * size  # tokens of the chunk before this item
        at = batch.chunk_offset[c] + done
        first = batch.chunk_start[c] + done
        count = jnp.minimum(batch.chunk_count[c] - done, size)
        rows = jax.lax.dynamic_slice_in_dim(q, at, size)  # [size, K, G, D]
        rows = rows.swapaxes(0, 1).reshape(K, size * G, D)
        position = first + jnp.arange(size * G) // G

        def block(b: jax.Array, running: Running) -> Running:
            table = jax.lax.dynamic_slice(
                pages.table, (batch.chunk_slot[c], b * pages.per_block), (1, pages.per_block)
            )
            k, v = pages.block(table[0])  # [K, span, D]
            seen = _seen(position, b * pages.span + jnp.arange(pages.span), window)
            return running.fold(rows, k, v, seen[None], softcap)

        start = jnp.maximum(first - (window - 1), 0) // pages.span if window else 0
        stop = (first + count - 1) // pages.span + 1
        found = jax.lax.fori_loop(start, stop, block, Running.empty(rows.shape, own)).result()
        found = found.reshape(K, size, G, D).swapaxes(0, 1)
        return jax.lax.dynamic_update_slice_in_dim(y, found, at, 0)

    return jax.lax.fori_loop(0, end[-1], item, jnp.zeros_like(q))[:T]


def _seen(position: jax.Array, keys: jax.Array, window: int) -> jax.Array:
    """bool[..., A, n]: may the query at position i32[..., A] see the key at keys i32[n]?"""
    seen = keys <= position[..., None]
    return seen & (keys > position[..., None] - window) if window else seen
