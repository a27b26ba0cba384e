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
from octavo.engine.arrays import running_sum, some, take
from octavo.engine.plan import chunk_segment, unpack
from octavo.engine.stages import pipeline
from octavo.engine.state import Dims, EngineState, PageState, SlotState
from octavo.models.ops import AttentionSpec, Ops
from octavo.models.registry import Model
from octavo.models.shards import SPLIT
from octavo.pallas_kernels.attention.batch import RaggedBatch
from octavo.pallas_kernels.sampling import (
    Across,
)


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


def across_of(machine: Machine, params: Any) -> Across | None:
    """The other shards of the model, where it has more than one."""
    shards, rank = machine.model.shards, getattr(params, "rank", None)
    if rank is None:
        return None
    floats = not machine.backend.branches
    return Across(rank[0, 0], rank[0, 1], SPLIT, shards.count, floats)


def ops_of(machine: Machine, batches: tuple[RaggedBatch, ...], across: Across | None = None) -> Ops:
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
        norms: jax.Array | None,
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
        gated_linear=backend.gated_linear,
        head=backend.head,
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
    chunk: jax.Array  # i32[C, 4]
    offset: jax.Array  # i32[C]


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
    C].
    """
    dims, slots, backend = machine.dims, state.slots, machine.backend
    nothing = jnp.zeros((dims.chunks, 4), jnp.int32)
    chunk = nothing if vector is None else chunk_segment(dims, vector)
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
    hidden, kv = _run(machine, params, flat, tuple(batches), state.kv)

    length, picked, final = _after(slots, flat, hidden, rows, decode)
    state = replace(state, slots=replace(slots, length=length), pages=tuple(groups), kv=kv)
    live = slots.active[:rows] | final if decode else final
    passed = Passed(picked, hidden[decode:] if tokens else None, live)
    return state, passed, jnp.concatenate(taken)


def _run(
    machine: Machine, params: Any, flat: _Tokens, batches: tuple[RaggedBatch, ...], kv: Any
) -> tuple[jax.Array, Any]:
    """The model on a step's tokens: hidden [N, E], and the cache."""
    model, across = machine.model, across_of(machine, params)
    if model.shards.stage == 1:
        ops = ops_of(machine, batches, across)
        return model.forward(params, flat.token, flat.position, kv, ops)

    def run(
        token: jax.Array, position: jax.Array, kv: Any, part: tuple[RaggedBatch, ...], layers: Any
    ) -> tuple[jax.Array, Any]:
        ops = replace(ops_of(machine, part, across), layers=layers)
        return model.forward(params, token, position, kv, ops)

    like = jax.ShapeDtypeStruct(params.embed.shape[1:], params.embed.dtype)
    layers = machine.backend.layers
    return pipeline(run, layers, model.shards.stage, flat.token, batches, kv, like)


def _after(
    slots: SlotState, flat: _Tokens, hidden: jax.Array, rows: int, decode: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Lengths i32[B] after the step, hidden [R, E] of each row's last token, and bool[R]: the row's
    prompt ended with this step. `decode` rows of the R were run."""
    chunk = flat.chunk
    slot = jnp.arange(slots.active.shape[0], dtype=jnp.int32)
    onehot = chunk[:, :1] == slot[None, :]  # [C, B]
    ran = jnp.sum(jnp.where(onehot, chunk[:, 2:3], 0), axis=0)  # [B] chunk tokens of each slot
    ran = ran + (slots.active & (slot < decode)).astype(jnp.int32)
    last = flat.offset + jnp.maximum(chunk[:, 2], 1) - 1  # [C]
    ends = onehot & (chunk[:, 3:4] != 0)
    final = some(ends, axis=0)[:rows]
    if hidden.shape[0] == decode:
        return slots.length + ran, hidden, final
    at = decode + jnp.sum(jnp.where(ends, last[:, None], 0), axis=0)[:rows]
    own = slot[:rows] if decode else jnp.zeros_like(slot[:rows])  # what was not run is not read
    return slots.length + ran, take(hidden, jnp.where(final, at, own)), final


def taken_capacity(dims: Dims, rows: int, tokens: int) -> int:
    """The most pages one step can take, per group."""
    return rows + (tokens // dims.page_size + dims.chunks if tokens else 0)
