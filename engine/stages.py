"""Pipeline stages: each device runs its own layers, and hands what it has to the next.

The tokens of a step are cut into micro-batches. In turn t, stage s runs its layers on micro-batch
t - s, and a step of M micro-batches over n stages takes M + n - 1 turns:

              turn 0   1   2   3   4
    stage 0        0   1   2   3   -
    stage 1        -   0   1   2   3

Every device runs the same program. Where it has no micro-batch, it computes what nobody reads, and
writes to the trash page. Embedding and final norm are computed in every stage, for they are little
and their weights are everywhere.

A turn reads the weights of a stage, however few its tokens: a step of few tokens is one
micro-batch, which takes as long as one device with all layers would.

    decode rows alone     R / M of them in each micro-batch
    chunk tokens beside   T / M consecutive tokens in each, and room for all R rows, of which R / M
                          count: a chunk's slot stays what it is. A chunk may lie in several; what a
                          later one attends to was written by the turn before.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from octavo.models.shards import STAGE
from octavo.pallas_kernels.attention.batch import RaggedBatch

LEAST = 256  # tokens in a micro-batch: with fewer, reading the weights takes longer than using them
MOST = 4  # micro-batches for each stage; the stages are busy 4 n of 5 n - 1 turns then
# run(token, position, cache, batches, layers) -> hidden, cache: the model with `layers` as
# Ops.layers(block, x, params, cache, specs).
Run = Callable[..., tuple[jax.Array, Any]]


@flax.struct.dataclass
class Micro:
    """The tokens of one micro-batch; or of all, with a leading axis."""

    token: jax.Array  # i32[n]
    position: jax.Array  # i32[n]
    batches: tuple[RaggedBatch, ...]  # one per page group


def pipeline(
    run: Run,
    layers: Callable[..., tuple[jax.Array, Any]],
    stages: int,
    token: jax.Array,
    batches: tuple[RaggedBatch, ...],
    cache: Any,
    like: jax.ShapeDtypeStruct,
) -> tuple[jax.Array, Any]:
    """All tokens i32[N] through all stages; of one shard, under `jax.shard_map`.

    layers: those of the backend, which run the layers of this stage. like: [E], a token's hidden
    state. Returns hidden [N, E], the same in every stage, and this stage's cache.
    """
    rows = batches[0].row_start.shape[0]
    tokens = token.shape[0] - rows
    parts = cut(token, batches, micro_batches(stages, rows, tokens))
    count, width = len(parts), parts[0].token.shape[0]
    every = jax.tree.map(lambda *same: jnp.stack(same), *parts)
    stage = jax.lax.axis_index(STAGE)
    blank = jnp.zeros((width, *like.shape), like.dtype)

    def own(block: Any, x: jax.Array, params: Any, held: Any, specs: Any) -> Any:
        """The layers of this stage, on what came from the one before."""
        kept, received = held
        x, kept = layers(block, jnp.where(stage == 0, x, received), params, kept, specs)
        return x, (kept, x)

    def turn(carry: tuple[Any, jax.Array, jax.Array], t: jax.Array) -> tuple[Any, None]:
        kept, received, done = carry
        at = jnp.clip(t - stage, 0, count - 1)
        part: Micro = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, at, 0, False), every)
        busy = at == t - stage
        only = tuple(silenced(batch, busy) for batch in part.batches)
        hidden, (kept, x) = run(part.token, part.position, (kept, received), only, own)
        before = jax.lax.dynamic_index_in_dim(done, at, 0, False)
        done = jax.lax.dynamic_update_index_in_dim(done, jnp.where(busy, hidden, before), at, 0)
        received = jax.lax.ppermute(x, STAGE, [(s, s + 1) for s in range(stages - 1)])
        return (kept, received, done), None

    turns = jnp.arange(count + stages - 1, dtype=jnp.int32)
    begin = (cache, blank, jnp.zeros((count, *blank.shape), blank.dtype))
    (cache, _, done), _ = jax.lax.scan(turn, begin, turns)
    done = jax.lax.psum(jnp.where(stage == stages - 1, done, 0), STAGE)
    return joined(done, rows, tokens), cache


def micro_batches(stages: int, rows: int, tokens: int) -> int:
    """How many a step of R rows and T chunk tokens has: M."""
    least = max(LEAST, rows) if tokens else LEAST  # each has all rows beside its chunk tokens
    return max(1, min(MOST * stages, (tokens or rows) // least))


def cut(token: jax.Array, batches: tuple[RaggedBatch, ...], count: int) -> list[Micro]:
    """`count` micro-batches, all of one shape."""
    rows = batches[0].row_start.shape[0]
    piece = _mixed if token.shape[0] > rows else _rows
    parts = []
    for i in range(count):
        cuts = [piece(batch, token, i, count) for batch in batches]
        parts.append(Micro(cuts[0][0], cuts[0][1].position, tuple(batch for _, batch in cuts)))
    return parts


def _rows(
    batch: RaggedBatch, token: jax.Array, i: int, count: int
) -> tuple[jax.Array, RaggedBatch]:
    """Part i of a batch of decode rows alone, with the rows of the table that it has."""
    each = -(-token.shape[0] // count)

    def mine(a: jax.Array) -> jax.Array:
        return _padded(a[i * each : (i + 1) * each], each)

    own = replace(
        batch,
        table=mine(batch.table),
        row_start=mine(batch.row_start),
        row_count=mine(batch.row_count),
        dest=mine(batch.dest),
        position=mine(batch.position),
        slot=jnp.arange(each, dtype=jnp.int32),
        real=mine(batch.real),
    )
    return mine(token), own


def _mixed(
    batch: RaggedBatch, token: jax.Array, i: int, count: int
) -> tuple[jax.Array, RaggedBatch]:
    """Part i of a batch with chunk tokens: some of these, and all rows, of which some count."""
    rows = batch.row_start.shape[0]
    tokens = token.shape[0] - rows
    each, first = -(-tokens // count), i * -(-tokens // count)
    mine = jnp.arange(rows) // -(-max(1, rows) // count) == i

    def of(a: jax.Array) -> jax.Array:
        cut = a[rows + min(first, tokens) : rows + min(first + each, tokens)]
        return jnp.concatenate([a[:rows], _padded(cut, each)])

    real = jnp.concatenate([batch.real[:rows] & mine, of(batch.real)[rows:]])
    end = batch.chunk_offset + batch.chunk_count
    begin = jnp.clip(batch.chunk_offset, first, first + each)
    own = replace(
        batch,
        row_count=jnp.where(mine, batch.row_count, 0),
        chunk_start=batch.chunk_start + begin - batch.chunk_offset,
        chunk_count=jnp.clip(end, first, first + each) - begin,
        chunk_offset=begin - first,
        dest=jnp.where(real, of(batch.dest), 0),
        position=of(batch.position),
        slot=of(batch.slot),
        real=real,
    )
    return of(token), own


def _padded(a: jax.Array, length: int) -> jax.Array:
    """Zeros behind: no real token, and the trash page."""
    return jnp.pad(a, [(0, length - a.shape[0])] + [(0, 0)] * (a.ndim - 1))


def silenced(batch: RaggedBatch, busy: jax.Array) -> RaggedBatch:
    """The batch where `busy`, and else one of the same shape in which nothing is real."""

    def only(a: jax.Array) -> jax.Array:
        return jnp.where(busy, a, jnp.zeros_like(a))

    return replace(
        batch,
        row_count=only(batch.row_count),
        chunk_count=only(batch.chunk_count),
        chunk_offset=only(batch.chunk_offset),
        dest=only(batch.dest),
        real=only(batch.real),
    )


def joined(done: jax.Array, rows: int, tokens: int) -> jax.Array:
    """What all micro-batches made, [M, n, E] -> [N, E] in the order of the step's tokens."""
    count = done.shape[0]
    if not tokens:
        return done.reshape(-1, done.shape[2])[:rows]
    each = -(-max(1, rows) // count)
    own = [done[i, min(i * each, rows) : min((i + 1) * each, rows)] for i in range(count)]
    return jnp.concatenate([*own, done[:, rows:].reshape(-1, done.shape[2])[:tokens]])
