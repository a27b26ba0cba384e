"""What changes logits before a token is drawn: masks, biases and penalties.

In this order, which is also the order of the functions here:

    allowed     ids outside a bit mask become -inf
    bad words   the last id of a forbidden sequence becomes -inf where the sequence would end
    stops       stop ids become -inf until min_tokens tokens are there
    bias        is added; -inf forbids
    repetition  ids of prompt or output:  x -> x / r if x > 0 else x * r
    frequency   ids of the output:        x -> x - f * times generated
    presence    ids of the output:        x -> x - p

Every index is clipped into the vocabulary, and entries that are not used change nothing.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from octavo.pallas_kernels.sampling.across import Across, ids_of
from octavo.pallas_kernels.sampling.controls import Controls

IN_PROMPT = 0.5  # the part of `counts` that marks ids of the prompt; its whole part counts
MOST = float(1 << 22)  # what is counted: beyond, a half would be lost
FORBIDDEN = -1e30  # a logit that is never drawn; finite, for those without infinities

IN_BOUNDS: dict[str, Any] = {"mode": "promise_in_bounds", "wrap_negative_indices": False}
Forbid = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


@flax.struct.dataclass
class Edits:
    """Everything optional: None leaves its part out of the program."""

    # u32[R, ceil(V / 32)] bit v % 32 of word v // 32; inside a shard bool[R, V]
    allowed: jax.Array | None = None
    bad_words: jax.Array | None = None  # i32[R, W, A] ids, right-aligned, -1 before them or unused
    recent: jax.Array | None = None  # i32[R, A - 1] the last ids of the sequence, -1 before it
    stop_ids: jax.Array | None = None  # i32[R, Z] -1 is unused
    below_min: jax.Array | None = None  # bool[R] fewer than min_tokens tokens so far
    bias_ids: jax.Array | None = None  # i32[R, NB] unused entries: any id, with bias 0
    bias: jax.Array | None = None  # f32[R, NB] is added
    counts: jax.Array | None = None  # f32[R, V] IN_PROMPT + times generated


def edit(
    logits: jax.Array,
    controls: Controls,
    edits: Edits,
    across: Across | None = None,
    *,
    branches: bool = True,
) -> jax.Array:
    """logits f32[R, V] with everything applied. Each part is skipped while no row needs it.

    `across`: the logits are one shard's part, while `edits` name ids of the whole vocabulary.
    Without `branches` nothing is skipped, and what is forbidden is FORBIDDEN or a few times that
    instead of -inf.
    """
    if across is not None:
        edits = _of_shard(edits, across, logits.shape[1])
    if_any = _if_any if branches else _always
    if edits.allowed is not None:
        logits = mask_allowed(logits, edits.allowed, -jnp.inf if branches else FORBIDDEN)
    forbid = _forbid if branches else _push_down
    if edits.bad_words is not None and edits.recent is not None:
        words = (edits.bad_words, edits.recent, forbid)
        logits = if_any(edits.bad_words >= 0, mask_bad_words, logits, *words)
    if edits.stop_ids is not None and edits.below_min is not None:
        stops = (edits.stop_ids, edits.below_min, forbid)
        logits = if_any(edits.below_min, mask_stops, logits, *stops)
    if edits.bias_ids is not None and edits.bias is not None:
        logits = if_any(edits.bias != 0, add_bias, logits, edits.bias_ids, edits.bias)
    if edits.counts is not None:
        c = controls
        wanted = (c.repetition != 1) | (c.frequency != 0) | (c.presence != 0)
        logits = if_any(wanted, penalize, logits, controls, edits.counts)
    return logits


def mask_allowed(logits: jax.Array, allowed: jax.Array, forbidden: float = -jnp.inf) -> jax.Array:
    """allowed u32[R, ceil(V / 32)], or bool[R, V]."""
    R, V = logits.shape
    if allowed.dtype == jnp.bool_:
        return jnp.where(allowed, logits, forbidden)
    bits = (allowed[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1  # [R, words, 32]
    return jnp.where(bits.reshape(R, -1)[:, :V] == 1, logits, forbidden)


def mask_bad_words(
    logits: jax.Array, words: jax.Array, recent: jax.Array, forbid: Forbid
) -> jax.Array:
    """words i32[R, W, A], recent i32[R, A - 1]."""
    before, last = words[:, :, :-1], words[:, :, -1]
    ends_here = ((before < 0) | (before == recent[:, None])).all(-1) & (last >= 0)  # [R, W]
    return forbid(logits, last, ends_here)


def mask_stops(
    logits: jax.Array, stop_ids: jax.Array, below_min: jax.Array, forbid: Forbid
) -> jax.Array:
    """stop_ids i32[R, Z], below_min bool[R]."""
    return forbid(logits, stop_ids, below_min[:, None] & (stop_ids >= 0))


def add_bias(logits: jax.Array, ids: jax.Array, bias: jax.Array) -> jax.Array:
    """ids i32[R, NB], bias f32[R, NB]."""
    flat = logits.reshape(-1).at[_flat(ids, logits.shape[1])]
    return flat.add(bias.reshape(-1), **IN_BOUNDS).reshape(logits.shape)


def penalize(logits: jax.Array, controls: Controls, counts: jax.Array) -> jax.Array:
    """counts f32[R, V]."""
    times = jnp.floor(counts)
    repetition = jnp.where(counts > 0, controls.repetition[:, None], 1.0)
    logits = jnp.where(logits > 0, logits / repetition, logits * repetition)
    logits = logits - controls.frequency[:, None] * times
    return logits - jnp.where(times > 0, controls.presence[:, None], 0.0)


def count_generated(counts: jax.Array, tokens: jax.Array, real: jax.Array) -> jax.Array:
    """counts f32[B, V] after row r < R generated tokens[r], where real bool[R]; stops at MOST."""
    at = _flat(tokens[:, None], counts.shape[1]).reshape(-1)
    flat = counts.reshape(-1)
    now = flat.at[at].get(**IN_BOUNDS)
    after = now + (real & (now < MOST)).astype(counts.dtype)
    return flat.at[at].set(after, **IN_BOUNDS).reshape(counts.shape)


def mark_prompt(
    counts: jax.Array, slot: jax.Array, tokens: jax.Array, real: jax.Array
) -> jax.Array:
    """counts f32[B, V] with tokens i32[T] of slot i32[T] marked as prompt, where real bool[T]."""
    marked = jnp.where(real, jnp.floor(counts[slot, tokens]) + IN_PROMPT, 0)
    return counts.at[slot, tokens].max(marked, mode="promise_in_bounds")


def _of_shard(edits: Edits, across: Across, V: int) -> Edits:
    """The edits in terms of the V ids of a shard: those of others are none."""
    ids, first = ids_of(across, V), across.rank * V
    allowed, counts, bias = edits.allowed, edits.counts, edits.bias
    if allowed is not None:
        bit = jnp.minimum(ids, allowed.shape[1] * 32 - 1)
        words = allowed.T.at[bit >> 5].get(**IN_BOUNDS).T  # [R, V]
        allowed = (words >> (bit & 31).astype(jnp.uint32)) & 1 == 1
    if counts is not None and counts.shape[1] > 1:
        B, n = counts.shape[0], across.count
        every = jnp.pad(counts, ((0, 0), (0, n * V - counts.shape[1]))).reshape(B, n, V)
        every = every.swapaxes(0, 1).reshape(n, B * V)
        counts = every.at[across.rank[None]].get(**IN_BOUNDS).reshape(B, V)
    if edits.bias_ids is not None and bias is not None:
        at = edits.bias_ids - first
        bias = jnp.where((at >= 0) & (at < V), bias, 0)
    bad = edits.bad_words
    if bad is not None:
        bad = jnp.concatenate([bad[:, :, :-1], _shifted(bad[:, :, -1:], first, V)], axis=2)
    return replace(
        edits,
        allowed=allowed,
        bad_words=bad,
        stop_ids=None if edits.stop_ids is None else _shifted(edits.stop_ids, first, V),
        bias_ids=None if edits.bias_ids is None else edits.bias_ids - first,
        bias=bias,
        counts=counts,
    )


def _shifted(ids: jax.Array, first: jax.Array, V: int) -> jax.Array:
    """Ids of the vocabulary as places in a shard's part of it; -1 where they are not in it."""
    at = ids - first
    return jnp.where((ids >= 0) & (at >= 0) & (at < V), at, -1)


def _forbid(logits: jax.Array, ids: jax.Array, where: jax.Array) -> jax.Array:
    """-inf at ids i32[R, n] where bool[R, n]."""
    limit = jnp.where(where, -jnp.inf, jnp.inf).astype(logits.dtype).reshape(-1)
    flat = logits.reshape(-1).at[_flat(ids, logits.shape[1])]
    return flat.min(limit, **IN_BOUNDS).reshape(logits.shape)


def _push_down(logits: jax.Array, ids: jax.Array, where: jax.Array) -> jax.Array:
    """FORBIDDEN is added at ids i32[R, n] where bool[R, n]; an id may be named a few times."""
    return add_bias(logits, ids, jnp.where(where, FORBIDDEN, 0.0))


def _flat(ids: jax.Array, vocab: int) -> jax.Array:
    """Places i32[R * n] in logits laid flat, in bounds, of ids i32[R, n], whatever they hold."""
    rows = jnp.arange(ids.shape[0], dtype=jnp.int32)[:, None]
    return (rows * vocab + jnp.clip(ids, 0, vocab - 1)).reshape(-1)


def _if_any(wanted: jax.Array, change, logits: jax.Array, *args):
    return jax.lax.cond(jnp.any(wanted), lambda: change(logits, *args), lambda: logits)


def _always(wanted: jax.Array, change, logits: jax.Array, *args):
    return change(logits, *args)
