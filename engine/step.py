"""One step: edit, forward, sample. Three pure functions of the state, and their composition.

    edit(slots, pages, plan)      stops, moves, returned pages, admissions, uploads
    forward(params, state, plan)  pop pages, run R decode rows and T chunk tokens, advance lengths
    sample(head, slots, hidden)   logits to tokens, mark the finished

Each takes only the part of the state that it changes: what goes through a program unchanged still
costs the host a few microseconds a leaf at every dispatch.

A steady decode step needs no plan: the device knows every slot's next token, length and page.
Shapes are static: R (decode rows; row r is slot r, and every slot touched is below R) and T (chunk
tokens).
"""

from dataclasses import dataclass, replace
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from octavo.backends.record import Backend
from octavo.engine import pages as page_ops
from octavo.engine import slots as slot_ops
from octavo.engine.arrays import put, running_sum, some, take
from octavo.engine.plan import CHUNKS, chunk_segment, unpack
from octavo.engine.state import BY_STOP, FINISHED, LIVE, Dims, EngineState, PageState, SlotState
from octavo.models.ops import AttentionSpec, Ops
from octavo.models.registry import Model
from octavo.models.shards import SPLIT
from octavo.pallas_kernels.attention.batch import RaggedBatch
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


@dataclass(frozen=True)
class Machine:
    """The static part of every step: sizes, model and backend."""

    dims: Dims
    model: Model
    backend: Backend
    mesh: Any = None  # jax.sharding.Mesh; None is one device


@flax.struct.dataclass
class Passed:
    """What a forward pass hands to sampling."""

    hidden: jax.Array  # [R, E] of each row's last token
    chunk_hidden: jax.Array | None  # [T, E] of the chunk tokens; None where there are none
    live: jax.Array  # bool[R] the row's hidden state is to be sampled


def _across(machine: Machine, params: Any) -> Across | None:
    """The other shards of the model, where it has more than one."""
    shards, rank = machine.model.shards, getattr(params, "rank", None)
    if rank is None:
        return None
    floats = not machine.backend.branches
    return Across(rank[0, 0], rank[0, 1], SPLIT, shards.count, floats)


def _ops(machine: Machine, batches: tuple[RaggedBatch, ...], across: Across | None = None) -> Ops:
    """The backend's operations, with attention bound to this step's batch of each page group."""
    backend = machine.backend

    def attend(
        q: jax.Array, k: jax.Array, v: jax.Array, cache: Any, spec: AttentionSpec, **extra: Any
    ) -> tuple[jax.Array, Any]:
        return backend.attend(
            q,
            k,
            v,
            cache,
            batches[spec.layer.group],
            window=spec.layer.window,
            scale=spec.scale,
            softcap=spec.softcap,
            **extra,
        )

    def attend_packed(
        mixed: jax.Array,
        turn: tuple[jax.Array, jax.Array],
        norms: tuple[jax.Array, jax.Array] | None,
        cache: Any,
        spec: AttentionSpec,
        eps: float,
        offset: float,
        **extra: Any,
    ) -> tuple[jax.Array, Any] | None:
        extra |= {"window": spec.layer.window, "scale": spec.scale, "softcap": spec.softcap}
        batch = batches[spec.layer.group]
        return backend.attend_packed(
            mixed, turn, norms, cache, batch, eps=eps, offset=offset, **extra
        )

    return Ops(
        attend=attend,
        linear=backend.linear,
        grouped_linear=backend.grouped_linear,
        layers=backend.layers,
        attend_packed=attend_packed,
        across=across,
        dense_experts=backend.dense_experts,
    )


def edit(
    machine: Machine, slots: SlotState, pages: tuple[PageState, ...], vector: jax.Array
) -> tuple[SlotState, tuple[PageState, ...]]:
    """Apply all of a plan but its chunks. vector i32[plan_size]."""
    plan = unpack(machine.dims, vector)
    slots, groups = slot_ops.stop(slots, plan.stop), list(pages)
    rows = jnp.arange(machine.dims.slots, dtype=jnp.int32)
    admitted = some(plan.admission[:, :1] == rows[None, :], axis=0)
    for g, group in enumerate(groups):
        group = page_ops.clear(group, plan.stop)
        for i in range(plan.move_src.shape[0]):
            group = page_ops.move_rows(group, plan.move_src[i], plan.move_dst[i])
        group = page_ops.push(group, plan.returned[g], plan.returned_count[g])
        group = page_ops.clear(group, admitted)
        group = page_ops.share(
            group,
            jnp.maximum(plan.admission[:, 0], 0),
            plan.admission[:, 0] >= 0,
            plan.first[:, g],
            plan.held[:, g],
            plan.shared[g],
        )
        groups[g] = page_ops.advance_window(group, plan.window_first[g])
    for i in range(plan.move_src.shape[0]):
        slots = slot_ops.move_rows(slots, plan.move_src[i], plan.move_dst[i])
    slots = slot_ops.upload(slot_ops.admit(slots, plan), plan)
    return slots, tuple(groups)


@dataclass(frozen=True)
class _Tokens:
    """The flat tokens of a step; see pallas_kernels/attention/batch.py for the order."""

    token: jax.Array  # i32[N]
    position: jax.Array  # i32[N]
    slot: jax.Array  # i32[N]
    real: jax.Array  # bool[N]
    chunk: jax.Array  # i32[CHUNKS, 4]
    offset: jax.Array  # i32[CHUNKS]


def _tokens(slots: SlotState, chunk: jax.Array, rows: int, tokens: int) -> _Tokens:
    """Lay out the tokens of `rows` decode rows, then the chunks'."""
    row = jnp.arange(rows, dtype=jnp.int32)
    token, position, slot = slots.last[:rows, 0], slots.length[:rows], row
    real = slots.active[:rows]
    end = running_sum(chunk[:, 2])
    if tokens:
        entry = jnp.arange(tokens, dtype=jnp.int32)
        owner = jnp.sum(entry[:, None] >= end[None, :], axis=1)  # [T]
        valid = entry < end[-1]
        owner = jnp.minimum(owner, chunk.shape[0] - 1)
        where = jnp.where(valid, take(chunk[:, 0], owner), 0)
        first = take(chunk[:, 1] - (end - chunk[:, 2]), owner)
        at = jnp.where(valid, first + entry, 0)
        width = slots.history.shape[1]
        token = jnp.concatenate([token, take(slots.history.reshape(-1), where * width + at)])
        position = jnp.concatenate([position, at])
        slot = jnp.concatenate([slot, where])
        real = jnp.concatenate([real, valid])
    return _Tokens(
        token=jnp.where(real, token, 0),
        position=jnp.where(real, position, 0),
        slot=slot,
        real=real,
        chunk=chunk,
        offset=end - chunk[:, 2],
    )


def forward(
    machine: Machine,
    params: Any,
    state: EngineState,
    vector: jax.Array | None,
    *,
    rows: int,
    tokens: int,
    context: int = 0,
) -> tuple[EngineState, Passed, jax.Array]:
    """Run R decode rows and T chunk tokens; vector may be None where T is 0.

    Where the backend keeps the two apart, a program with T > 0 decodes nothing; its R rows are
    those that may be sampled. context: no slot's tokens reach past that many pages; 0 is any.

    Returns the state with keys, values, pages and lengths advanced, what sampling needs, and the
    pages taken, one i32 vector:  per group: free_top after, count, then the pages [R + T / S +
    CHUNKS].
    """
    dims, slots, backend = machine.dims, state.slots, machine.backend
    chunk = jnp.zeros((CHUNKS, 4), jnp.int32) if vector is None else chunk_segment(dims, vector)
    chunk = chunk[: backend.most_chunks or CHUNKS]
    decode = rows if backend.mixed or not tokens else 0
    flat = _tokens(slots, chunk, decode, tokens)
    groups, batches, taken = [], [], []
    capacity = taken_capacity(dims, rows, tokens)
    for pages in state.pages:
        after, dest, count = page_ops.grow(
            pages, flat.slot, flat.position, flat.real, shift=dims.shift
        )
        order = jnp.maximum(pages.free_top - 1 - jnp.arange(capacity, dtype=jnp.int32), 0)
        taken.append(jnp.stack([after.free_top, count]))
        taken.append(take(pages.free_stack, order))
        groups.append(after)
        batches.append(
            RaggedBatch(
                table=after.table[:rows, : context or dims.pages_per_slot],
                row_start=slots.length[:decode],
                row_count=slots.active[:decode].astype(jnp.int32),
                chunk_slot=chunk[:, 0],
                chunk_start=chunk[:, 1],
                chunk_count=chunk[:, 2],
                chunk_offset=flat.offset,
                dest=dest,
                position=flat.position,
                slot=flat.slot,
                real=flat.real,
                page_size=dims.page_size,
            )
        )
    ops = _ops(machine, tuple(batches), _across(machine, params))
    hidden, kv = machine.model.forward(params, flat.token, flat.position, state.kv, ops)

    length, picked, final = _after(slots, flat, hidden, rows, decode)
    state = replace(state, slots=replace(slots, length=length), pages=tuple(groups), kv=kv)
    live = slots.active[:rows] | final if decode else final
    passed = Passed(picked, hidden[decode:] if tokens else None, live)
    return state, passed, jnp.concatenate(taken)


def _after(
    slots: SlotState, flat: _Tokens, hidden: jax.Array, rows: int, decode: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Lengths i32[B] after the step, hidden [R, E] of each row's last token, and bool[R]: the row's
    prompt ended with this step. `decode` rows of the R were run."""
    chunk = flat.chunk
    slot = jnp.arange(slots.active.shape[0], dtype=jnp.int32)
    onehot = chunk[:, :1] == slot[None, :]  # [CHUNKS, B]
    ran = jnp.sum(jnp.where(onehot, chunk[:, 2:3], 0), axis=0)  # [B] chunk tokens of each slot
    ran = ran + (slots.active & (slot < decode)).astype(jnp.int32)
    last = flat.offset + jnp.maximum(chunk[:, 2], 1) - 1  # [CHUNKS]
    ends = onehot & (chunk[:, 3:4] != 0)
    final = some(ends, axis=0)[:rows]
    if hidden.shape[0] == decode:
        return slots.length + ran, hidden, final
    at = decode + jnp.sum(jnp.where(ends, last[:, None], 0), axis=0)[:rows]
    own = slot[:rows] if decode else jnp.zeros_like(slot[:rows])  # what was not run is not read
    return slots.length + ran, take(hidden, jnp.where(final, at, own)), final


def taken_capacity(dims: Dims, rows: int, tokens: int) -> int:
    """The most pages one step can take, per group."""
    return rows + (tokens // dims.page_size + CHUNKS if tokens else 0)


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
    across = _across(machine, params)
    logits = machine.model.logits(params, passed.hidden, _ops(machine, (), across))  # f32[R, V]
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
    i32[CHUNKS, M]: tokens that each chunk's request wants too. Returns ids i32[T, k], their
    logprobs f32[T, k], the targets' f32[T], ranks i32[T] and those of the named f32[T, M]. Blocks
    of tokens bound the memory of the logits.
    """
    across = _across(machine, params)
    block = next(n for n in (64, 32, 16, 8, 4, 2, 1) if hidden.shape[0] % n == 0)

    def one(part: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
        rows, target, chunk = part
        logits = machine.model.logits(params, rows, _ops(machine, (), across))
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
