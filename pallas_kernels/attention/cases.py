"""Random ragged steps: what the tests and the benchmarks of every implementation run on."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from octavo.pallas_kernels.attention.batch import RaggedBatch
from octavo.pallas_kernels.attention.reference import KV


@dataclass(frozen=True)
class Case:
    """One step: rows and chunks by the tokens they had before, and the tokens they bring."""

    rows: tuple[tuple[int, int], ...]  # per slot (tokens in the cache, tokens now: 0 is idle)
    chunks: tuple[tuple[int, int, int], ...] = ()  # (slot, tokens in the cache, tokens now)
    heads: tuple[int, int, int] = (4, 2, 64)  # H, K, D
    page_size: int = 16
    pages_per_slot: int = 8
    tokens_per_row: int = 1
    chunk_tokens: int = 0  # T; raised to what the chunks bring
    chunk_entries: int = 0  # C; raised to the number of chunks
    window: int = 0
    softcap: float = 0.0
    sinks: bool = False
    scaled: bool = False  # keys and values have scales
    shared: tuple[tuple[int, int, int], ...] = ()  # (slot, other slot, first pages of both)


Inputs = tuple[jnp.ndarray, jnp.ndarray, jnp.ndarray, KV, RaggedBatch]


def inputs(case: Case, seed: int = 0, dtype: str = "float32", cache_dtype: str = "") -> Inputs:
    """q, k, v, a cache full of random numbers, and the batch, over a shuffled pool.

    Numbers of a cache with scales (`extras`) use most of 8 bits.

    Each slot holds the pages up to its last token and no more; the rest of its table is 0.
    """
    rng = np.random.default_rng(seed)
    H, K, D = case.heads
    lengths = [start + count for start, count in case.rows]
    for slot, start, count in case.chunks:
        lengths[slot] = start + count
    table = _table(rng, lengths, case)
    batch = _batch(table, case)
    N = batch.dest.shape[0]

    def normal(*shape: int) -> jnp.ndarray:
        return jnp.asarray(rng.normal(size=shape), dtype)

    pool = (len(case.rows) * case.pages_per_slot + 1, K, case.page_size, D)
    cache = KV(k=normal(*pool), v=normal(*pool))
    if cache_dtype:
        size = 30 if case.scaled else 1
        cache = KV(*(jnp.clip(x * size, -127, 127).astype(cache_dtype) for x in (cache.k, cache.v)))
    return normal(N, H, D), normal(N, K, D), normal(N, K, D), cache, batch


def extras(case: Case, seed: int = 0) -> dict[str, jnp.ndarray]:
    """`sinks` and `kv_scales` of a case, where it has them; scales that use all of 8 bits."""
    rng = np.random.default_rng(seed + 1)
    H, K, _ = case.heads
    found = {}
    if case.sinks:
        found["sinks"] = jnp.asarray(rng.normal(size=H) * 2, jnp.float32)
    if case.scaled:
        found["kv_scales"] = jnp.asarray(rng.uniform(0.02, 0.05, (2, K)), jnp.float32)
    return found


def _table(rng: np.random.Generator, lengths: list[int], case: Case) -> np.ndarray:
    R, M, S = len(lengths), case.pages_per_slot, case.page_size
    table = 1 + rng.permutation(R * M).reshape(R, M)
    for slot, length in enumerate(lengths):
        assert length <= M * S, f"{slot=} {length=} does not fit {M=} pages of {S=} tokens"
        table[slot, -(-length // S) :] = 0
    for slot, other, pages in case.shared:
        table[slot, :pages] = table[other, :pages]
    return table


def _batch(table: np.ndarray, case: Case) -> RaggedBatch:
    R, Q, S = len(case.rows), case.tokens_per_row, case.page_size
    T = max(case.chunk_tokens, sum(count for _, _, count in case.chunks))
    C = max(case.chunk_entries, len(case.chunks))
    position, slot = np.zeros(R * Q + T, np.int32), np.zeros(R * Q + T, np.int32)
    real = np.zeros(R * Q + T, bool)
    for r, (start, count) in enumerate(case.rows):
        at = slice(r * Q, r * Q + count)
        position[at], slot[at], real[at] = start + np.arange(count), r, True
    chunk = np.zeros((4, C), np.int32)  # slot, start, count, offset
    offset = 0
    for c, (s, start, count) in enumerate(case.chunks):
        at = slice(R * Q + offset, R * Q + offset + count)
        position[at], slot[at], real[at] = start + np.arange(count), s, True
        chunk[:, c] = s, start, count, offset
        offset += count
    chunk[3, len(case.chunks) :] = offset
    dest = np.where(real, table[slot, position // S] * S + position % S, 0)
    rows = np.array(case.rows, np.int32).reshape(R, 2)
    arrays = dict(table=table, row_start=rows[:, 0], row_count=rows[:, 1])
    arrays |= dict(chunk_slot=chunk[0], chunk_start=chunk[1], chunk_count=chunk[2])
    arrays |= dict(chunk_offset=chunk[3], dest=dest, position=position, slot=slot)
    return RaggedBatch(
        real=jnp.asarray(real),
        page_size=S,
        tokens_per_row=Q,
        **{name: jnp.asarray(array, jnp.int32) for name, array in arrays.items()},
    )
