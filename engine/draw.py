"""The end of a step: hidden states to logits, logits to tokens, and prompts' log probabilities.

sample(head, slots, hidden)   logits to tokens, mark the finished
score(head, hidden, targets)  log probabilities of a prompt's own tokens
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from octavo.engine.arrays import put, some, take
from octavo.engine.state import BY_STOP, FINISHED, LIVE, SlotState
from octavo.engine.step import Machine, Passed, across_of, ops_of
from octavo.pallas_kernels.sampling import (
    Across,
    Controls,
    Edits,
    count_generated,
    named_logprobs,
    top_logprobs,
)
from octavo.pallas_kernels.sampling import argmax as likeliest
from octavo.pallas_kernels.sampling import sample as sample_tokens


def sample(
    machine: Machine,
    params: Any,
    slots: SlotState,
    passed: Passed,
    mask: jax.Array | None = None,
    named: jax.Array | None = None,
    *,
    logprobs: int = 0,
    greedy: bool = False,
) -> tuple[SlotState, jax.Array, tuple[jax.Array, ...]]:
    """Turn hidden states into tokens and mark the finished.

    greedy: the host knows that every live row takes the likeliest token of the logits as they come.

    mask u32[R, ceil(V / 32)]: bit v of a row allows token v. logprobs > 0 also returns the
    likeliest, and the log probabilities of the tokens named i32[R, M]. Returns the slots, rows
    i32[4, R] (flags, token, logprob bits, length after), and with logprobs (ids i32[R, k],
    logprobs f32[R, k], rank i32[R], those of the named f32[R, M]), else an empty tuple.
    """
    live = passed.live
    rows = live.shape[0]
    across = across_of(machine, params)
    logits = machine.model.logits(params, passed.hidden, ops_of(machine, (), across))  # f32[R, V]
    length, generated = slots.length[:rows], (slots.length - slots.prompt_len)[:rows]
    if greedy:
        token, logprob = likeliest(logits, across), jnp.zeros((rows,), jnp.float32)
    else:
        token, logprob = _choose(machine, slots, logits, mask, logprobs > 0, across)
    by_stop = live & some(token[:, None] == slots.stop_ids[:rows], axis=1)
    by_stop = by_stop & (generated + 1 >= slots.min_tokens[:rows])
    finished = by_stop | (live & (length + 1 >= slots.limit[:rows]))
    slots = _advance(slots, token, live, finished, count=not greedy)
    flags = live * LIVE + finished * FINISHED + by_stop * BY_STOP
    packed = jnp.stack(
        [
            flags.astype(jnp.int32),
            jnp.where(live, token, -1),
            jax.lax.bitcast_convert_type(logprob, jnp.int32),
            length,
        ]
    )
    extra: tuple[jax.Array, ...] = ()
    if logprobs:
        branches = machine.backend.branches
        best = top_logprobs(logits, token, logprobs, across, branches=branches)
        ids, values, _, rank = best
        assert named is not None, "logprobs come with the tokens named by requests"
        extra = (ids, values, rank, named_logprobs(logits, named, across))
    return slots, packed, extra


def _choose(
    machine: Machine,
    slots: SlotState,
    logits: jax.Array,
    mask: jax.Array | None,
    logprob: bool,
    across: Across | None,
) -> tuple[jax.Array, jax.Array]:
    """Tokens i32[R] and their log probabilities f32[R], by every row's own parameters."""
    rows = logits.shape[0]
    length, generated = slots.length[:rows], (slots.length - slots.prompt_len)[:rows]
    edits = Edits(
        allowed=mask,
        stop_ids=slots.stop_ids[:rows],
        below_min=generated < slots.min_tokens[:rows],
        bias_ids=slots.bias_ids[:rows],
        bias=slots.bias[:rows],
        counts=slots.counts[:rows] if machine.dims.counts else None,
    )
    controls = Controls.unpack(slots.sampling[:rows])
    return sample_tokens(
        logits,
        controls,
        slots.seed[:rows],
        length,
        edits,
        logprobs=logprob,
        across=across,
        branches=machine.backend.branches,
    )


def _advance(
    slots: SlotState, token: jax.Array, live: jax.Array, finished: jax.Array, *, count: bool
) -> SlotState:
    """Remember the sampled tokens; rows that were not live stay as they are.

    count: for penalties. A row in a greedy batch has none, now or later.
    """
    rows = token.shape[0]
    row = jnp.arange(rows, dtype=jnp.int32)
    width = slots.history.shape[1]
    trash = slots.active.shape[0] * width
    at = jnp.minimum(slots.length[:rows], width - 1)
    cell = jnp.where(live, row * width + at, trash)
    history = put(slots.history.reshape(-1), cell, token).reshape(slots.history.shape)
    counts = slots.counts
    if count and counts.shape[1] > 1:
        counts = count_generated(counts, token, live)
    last = jnp.where(live, token, slots.last[:rows, 0])[:, None]
    active = jnp.where(live, ~finished, slots.active[:rows])
    return replace(
        slots,
        active=jnp.concatenate([active, slots.active[rows:]]),
        last=jnp.concatenate([last, slots.last[rows:]]),
        history=history,
        counts=counts,
    )


def score(
    machine: Machine,
    params: Any,
    hidden: jax.Array,
    targets: jax.Array,
    named: jax.Array,
    *,
    logprobs: int,
) -> tuple[jax.Array, ...]:
    """Log probabilities of a prompt's own tokens.

    hidden [T, E]; targets i32[2, T]: the token that follows each, and its chunk; named
    i32[C, M]: tokens that each chunk's request wants too. Returns ids i32[T, k], their
    logprobs f32[T, k], the targets' f32[T], ranks i32[T] and those of the named f32[T, M]. Blocks
    of tokens bound the memory of the logits.
    """
    across = across_of(machine, params)
    block = next(n for n in (64, 32, 16, 8, 4, 2, 1) if hidden.shape[0] % n == 0)

    def one(part: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
        rows, target, chunk = part
        logits = machine.model.logits(params, rows, ops_of(machine, (), across))
        best = top_logprobs(logits, target, logprobs, across, branches=branches)
        return (*best, named_logprobs(logits, take(named, chunk), across))

    branches = machine.backend.branches
    target, chunk = targets.reshape(2, -1, block)
    every = (hidden.reshape(-1, block, hidden.shape[1]), target, chunk)
    if branches:
        parts = jax.lax.map(one, every)
    else:
        each = [one((hidden, t, c)) for hidden, t, c in zip(*every, strict=True)]
        return tuple(jnp.concatenate(part) for part in zip(*each, strict=True))
    return tuple(part.reshape(-1, *part.shape[2:]) for part in parts)
