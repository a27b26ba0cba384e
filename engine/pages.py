"""Pages on the device: pop, push, share and release, as pure functions of a PageState.

Only the device pops; only the host decides, by id, what is pushed back. The functions use few
operations, so that every backend compiles them: shifts and masks instead of division, flat
in-bounds indices, no sort, no cond. A table cell outside [first, held) is 0.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp

from octavo.engine.arrays import copy_row, put, put_where, running_sum, take
from octavo.engine.state import PageState


def push(pages: PageState, ids: jax.Array, count: jax.Array) -> PageState:
    """Put ids[:count] back on the stack.

    ids i32[U] (the rest is garbage that lands above the top, where nothing is read), count i32[].
    """
    cell = pages.free_top + jnp.arange(ids.shape[0], dtype=jnp.int32)
    stack = put(pages.free_stack, cell, ids)
    return replace(pages, free_stack=stack, free_top=pages.free_top + count)


def clear(pages: PageState, which: jax.Array) -> PageState:
    """The slots in `which` (bool[B]) hold nothing any more; their pages are the host's to push."""
    return replace(
        pages,
        table=jnp.where(which[:, None], 0, pages.table),
        first=jnp.where(which, 0, pages.first),
        held=jnp.where(which, 0, pages.held),
    )


def share(
    pages: PageState,
    slot: jax.Array,
    used: jax.Array,
    first: jax.Array,
    held: jax.Array,
    ids: jax.Array,
) -> PageState:
    """Write the pages that newly admitted slots begin with.

    slot, first, held i32[A], used bool[A]: slot[a] gets the next held[a] - first[a] of ids i32[U]
    as its pages first[a] .. held[a] - 1. The slots were cleared before.
    """
    slots, per_slot = pages.table.shape
    first, held = jnp.where(used, first, 0), jnp.where(used, held, 0)
    count = held - first  # [A]
    end = running_sum(count)
    entry = jnp.arange(ids.shape[0], dtype=jnp.int32)
    owner = jnp.minimum(jnp.sum(entry[:, None] >= end[None, :], axis=1), slot.shape[0] - 1)  # [U]
    valid = entry < end[-1]
    cell = take(slot * per_slot + first - (end - count), owner) + entry
    table = put_where(pages.table.reshape(-1), cell, valid, ids)
    onehot = used[:, None] & (
        slot[:, None] == jnp.arange(slots, dtype=jnp.int32)[None, :]
    )  # [A, B]
    return replace(
        pages,
        table=table.reshape(slots, per_slot),
        first=pages.first + jnp.sum(jnp.where(onehot, first[:, None], 0), axis=0),
        held=pages.held + jnp.sum(jnp.where(onehot, held[:, None], 0), axis=0),
    )


def advance_window(pages: PageState, first: jax.Array) -> PageState:
    """Forget the pages below first (i32[B]; 0 where nothing changes): a window moved past them."""
    first = jnp.minimum(jnp.maximum(pages.first, first), pages.held)
    index = jnp.arange(pages.table.shape[1], dtype=jnp.int32)
    return replace(
        pages, table=jnp.where(index[None, :] < first[:, None], 0, pages.table), first=first
    )


def grow(
    pages: PageState, slot: jax.Array, position: jax.Array, real: jax.Array, *, shift: int
) -> tuple[PageState, jax.Array, jax.Array]:
    """Pop a page for every token that begins one.

    slot, position i32[N], real bool[N]; a slot's tokens continue where its held pages may end, so a
    page that is missing begins with a token of this step. Pages go out in the order of the tokens.
    Returns the new state, dest i32[N] (page * S + position % S; a cell of the trash page for
    padding) and count i32[]: the pages taken are free_stack[free_top - 1 - i] of the state before.
    """
    slots, per_slot = pages.table.shape
    mask = (1 << shift) - 1
    index = position >> shift
    begins = real & ((position & mask) == 0) & (index >= take(pages.held, slot))
    new = begins.astype(jnp.int32)
    rank = running_sum(new) - new
    page = take(pages.free_stack, jnp.maximum(pages.free_top - 1 - rank, 0))
    cell = jnp.where(real, slot * per_slot + index, 0)
    table = put_where(pages.table.reshape(-1), cell, begins, page)
    count = jnp.sum(new, dtype=jnp.int32)
    offset = position & mask
    dest = jnp.where(real, take(table, cell) * (1 << shift) + offset, offset)
    owns = slot[:, None] == jnp.arange(slots, dtype=jnp.int32)[None, :]  # [N, B]
    pages = replace(
        pages,
        table=table.reshape(slots, per_slot),
        held=pages.held + jnp.sum(jnp.where(owns, new[:, None], 0), axis=0),
        free_top=pages.free_top - count,
    )
    return pages, dest, count


def move_rows(pages: PageState, src: jax.Array, dst: jax.Array) -> PageState:
    """Row dst becomes row src, and src is empty after. i32[]; src == dst changes nothing.

    What dst held before is forgotten: the host moves onto empty slots only.
    """
    moved = replace(
        pages,
        table=copy_row(pages.table, src, dst),
        first=copy_row(pages.first, src, dst),
        held=copy_row(pages.held, src, dst),
    )
    rows = jnp.arange(pages.table.shape[0], dtype=jnp.int32)
    return clear(moved, (rows == src) & (src != dst))
