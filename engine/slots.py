"""Slots on the device: stop, move, admit and upload, as pure functions of a SlotState."""

from dataclasses import replace

import jax
import jax.numpy as jnp

from octavo.engine.arrays import add, copy_row, put, running_sum, some, take
from octavo.engine.plan import BIAS_IDS, BIAS_VALUES, HISTORY, SCALARS, Plan
from octavo.engine.state import TERMS, SlotState

IN_PROMPT = 0.5  # of SlotState.counts


def stop(slots: SlotState, which: jax.Array) -> SlotState:
    """The slots in `which` (bool[B]) decode no more."""
    return replace(slots, active=slots.active & ~which, length=jnp.where(which, 0, slots.length))


def move_rows(slots: SlotState, src: jax.Array, dst: jax.Array) -> SlotState:
    """Row dst becomes row src, and src is idle after. i32[]; src == dst changes nothing."""
    moved = jax.tree.map(lambda leaf: copy_row(leaf, src, dst), slots)
    rows = jnp.arange(slots.active.shape[0], dtype=jnp.int32)
    return stop(moved, (rows == src) & (src != dst))


def admit(slots: SlotState, plan: Plan) -> SlotState:
    """Give newly admitted sequences their slots; they are idle until their prompt has run."""
    column = {name: plan.admission[:, i] for i, name in enumerate(SCALARS)}  # each i32[A]
    rows = jnp.arange(slots.active.shape[0], dtype=jnp.int32)
    onehot = column["slot"][:, None] == rows[None, :]  # [A, B]; slot -1 matches none
    taken = some(onehot, axis=0)  # [B]

    def place(old: jax.Array, new: jax.Array) -> jax.Array:
        """new [A, ...] into the rows of old [B, ...] that were taken."""
        trail = (1,) * (old.ndim - 1)
        hot = onehot.reshape(onehot.shape + trail)
        picked = jnp.sum(jnp.where(hot, new[:, None], 0), axis=0).astype(old.dtype)
        return jnp.where(taken.reshape(taken.shape + trail), picked, old)

    at = SCALARS.index("prompt_len")
    sampling = jax.lax.bitcast_convert_type(plan.sampling, jnp.int32)
    terms = [plan.admission[:, at : at + TERMS], plan.stop_ids, sampling]
    nothing = jnp.zeros_like(slots.bias[:1])
    spared = jnp.concatenate([taken, jnp.zeros((1,), jnp.bool_)])[:, None]
    return replace(
        slots,
        active=slots.active & ~taken,
        length=place(slots.length, column["length"]),
        adapter=place(slots.adapter, column["adapter"]),
        terms=place(slots.terms, jnp.concatenate(terms, axis=1)),
        counts=jnp.where(taken[:, None], jnp.float32(0), slots.counts),
        bias=jnp.where(spared, nothing, slots.bias),
    )


def upload(slots: SlotState, plan: Plan) -> SlotState:
    """Write the tokens and biases that a plan carries for its newly admitted slots."""
    slot, offset, count, kind = (plan.piece[:, i] for i in range(4))  # each i32[3 A]
    end = running_sum(count)
    entry = jnp.arange(plan.upload.shape[0], dtype=jnp.int32)
    owner = jnp.minimum(jnp.sum(entry[:, None] >= end[None, :], axis=1), slot.shape[0] - 1)
    real = entry < end[-1]
    column = take(offset - (end - count), owner) + entry
    row, kinds = take(slot, owner), take(kind, owner)
    trash = slots.active.shape[0]  # the row that takes padding

    def scatter(leaf: jax.Array, which: int, values: jax.Array) -> jax.Array:
        width = leaf.shape[1]
        mine = real & (kinds == which)
        cell = jnp.where(mine, row * width + column, trash * width)
        return put(leaf.reshape(-1), cell, values).reshape(leaf.shape)

    return replace(
        slots,
        history=scatter(slots.history, HISTORY, plan.upload),
        bias_ids=scatter(slots.bias_ids, BIAS_IDS, plan.upload),
        bias=scatter(
            slots.bias, BIAS_VALUES, jax.lax.bitcast_convert_type(plan.upload, jnp.float32)
        ),
        counts=_count(slots, row, column, plan.upload, real & (kinds == HISTORY)),
    )


def _count(
    slots: SlotState, row: jax.Array, column: jax.Array, token: jax.Array, mine: jax.Array
) -> jax.Array:
    """Mark prompt tokens as seen, and count those that were generated before a preemption."""
    vocab = slots.counts.shape[1]
    if vocab == 1:  # penalties are off
        return slots.counts
    cell = jnp.where(mine, row * vocab + jnp.clip(token, 0, vocab - 1), 0)
    prompt = mine & (column < take(slots.prompt_len, jnp.where(mine, row, 0)))
    flat = slots.counts.reshape(-1)
    # Counts have no cell for padding. So what is no prompt token marks one that is, again.
    spare = jnp.max(jnp.where(prompt, cell, -1))
    marked = jnp.where(prompt, cell, jnp.maximum(spare, 0))
    old = take(flat, marked)
    flat = put(flat, marked, jnp.where(spare < 0, old, jnp.floor(old) + IN_PROMPT))
    flat = add(flat, cell, (mine & ~prompt).astype(jnp.float32))
    return flat.reshape(slots.counts.shape)
