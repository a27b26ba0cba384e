"""The pages on the device against a short Python model, on random traces."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from octavo.engine import pages as page_ops
from octavo.engine.state import Dims, PageGroup, PageState, empty_pages

SLOTS, PER_SLOT, SIZE, PAGES = 4, 6, 4, 12
DIMS = Dims(
    slots=SLOTS,
    page_size=SIZE,
    max_len=SIZE * PER_SLOT,
    vocab=8,
    groups=(PageGroup(0, PAGES),),
    controls=1,
    max_chunk=8,
)
TOKENS = 16  # tokens of one grow


@dataclass
class Model:
    """Who holds which page, in lists."""

    free: list[int] = field(default_factory=lambda: list(range(1, PAGES)))
    rows: list[dict[int, int]] = field(default_factory=lambda: [{} for _ in range(SLOTS)])
    first: list[int] = field(default_factory=lambda: [0] * SLOTS)
    held: list[int] = field(default_factory=lambda: [0] * SLOTS)
    away: list[int] = field(default_factory=list)  # cleared, not pushed back yet: the host's
    length: list[int] = field(default_factory=lambda: [0] * SLOTS)

    def owners(self, page: int) -> int:
        return sum(page in row.values() for row in self.rows)

    def drop(self, pages: list[int]) -> None:
        self.away += [page for page in pages if self.owners(page) == 0 and page not in self.away]

    def clear(self, slot: int) -> None:
        pages = list(self.rows[slot].values())
        self.rows[slot] = {}
        self.first[slot] = self.held[slot] = self.length[slot] = 0
        self.drop(pages)

    def grow(self, slot: int, count: int) -> list[int]:
        """The page of each of `count` tokens that continue the slot."""
        out = []
        for position in range(self.length[slot], self.length[slot] + count):
            index = position // SIZE
            if index >= self.held[slot]:
                self.rows[slot][index] = self.free.pop()
                self.held[slot] = index + 1
            out.append(self.rows[slot][index])
        self.length[slot] += count
        return out


push, clear, share = jax.jit(page_ops.push), jax.jit(page_ops.clear), jax.jit(page_ops.share)
advance, move = jax.jit(page_ops.advance_window), jax.jit(page_ops.move_rows)
grow = jax.jit(partial(page_ops.grow, shift=DIMS.shift))


def padded(values: list[int], length: int, filler: int = 0) -> jax.Array:
    return jnp.asarray(values + [filler] * (length - len(values)), jnp.int32)


class Both:
    """The device's pages and the model of them; every operation is applied to both."""

    def __init__(self) -> None:
        self.device: PageState = empty_pages(DIMS, DIMS.groups[0])
        self.model = Model(free=np.asarray(self.device.free_stack)[: PAGES - 1].tolist())

    def play(self, kind: str, a: int, b: int, c: int) -> None:
        getattr(self, kind)(a % SLOTS, b % SLOTS, c)
        self.agree()

    def grow(self, slot: int, other: int, count: int) -> None:
        """Two slots grow in one step, each by a share of `count`."""
        wanted = [(slot, count % 7)] + ([(other, count % 5)] if other != slot else [])
        slots: list[int] = []
        positions: list[int] = []
        pages: list[int] = []
        before = len(self.model.free)
        for s, n in wanted:
            room = SIZE * PER_SLOT - self.model.length[s]
            have = self.model.held[s] * SIZE - self.model.length[s]
            n = min(n, room, have + SIZE * len(self.model.free))
            start = self.model.length[s]
            slots += [s] * n
            positions += list(range(start, start + n))
            pages += self.model.grow(s, n)
        real = jnp.arange(TOKENS) < len(slots)
        stack = np.asarray(self.device.free_stack)
        top = int(self.device.free_top)
        self.device, dest, taken = grow(
            self.device, padded(slots, TOKENS), padded(positions, TOKENS), real
        )
        assert int(taken) == before - len(self.model.free)
        want = [page * SIZE + p % SIZE for page, p in zip(pages, positions, strict=True)]
        assert np.asarray(dest)[: len(want)].tolist() == want
        assert (np.asarray(dest)[len(want) :] < SIZE).all(), "padding writes to the trash page"
        new = sorted(stack[top - 1 - i] for i in range(int(taken)))
        assert 0 not in new

    def push(self, _a: int, _b: int, count: int) -> None:
        back, self.model.away = self.model.away[:count], self.model.away[count:]
        self.model.free += back
        ids = padded(back, DIMS.returns, filler=99)
        self.device = push(self.device, ids, jnp.int32(len(back)))

    def clear(self, slot: int, other: int, _c: int) -> None:
        for s in {slot, other}:
            self.model.clear(s)
        which = np.isin(np.arange(SLOTS), [slot, other])
        self.device = clear(self.device, jnp.asarray(which))

    def share(self, slot: int, source: int, count: int) -> None:
        """A slot that is empty begins with a stretch of another's pages."""
        model = self.model
        if model.held[slot] or slot == source:
            return
        held = min(model.held[source], model.length[source] // SIZE)
        first = min(held, max(model.first[source], count % 3))
        ids = [model.rows[source][i] for i in range(first, held)]
        model.rows[slot] = dict(zip(range(first, held), ids, strict=True))
        model.first[slot], model.held[slot], model.length[slot] = first, held, held * SIZE
        # A second entry that is unused, and one before it that begins with nothing.
        empty = next((s for s in range(SLOTS) if not model.held[s] and s != slot), slot)
        self.device = share(
            self.device,
            jnp.array([empty, slot, 0], jnp.int32),
            jnp.array([empty != slot, True, False]),
            jnp.array([0, first, 3], jnp.int32),
            jnp.array([0, held, 5], jnp.int32),
            padded(ids, DIMS.returns, filler=77),
        )

    def advance(self, slot: int, other: int, count: int) -> None:
        """Only pages that are full can be behind a window."""
        first = [0] * SLOTS
        first[other] = min(count % 2, self.model.length[other] // SIZE)
        first[slot] = min(count % (PER_SLOT + 1), self.model.length[slot] // SIZE)
        for s in range(SLOTS):
            to = min(max(self.model.first[s], first[s]), self.model.held[s])
            gone = [self.model.rows[s].pop(i) for i in range(self.model.first[s], to)]
            self.model.first[s] = to
            self.model.drop(gone)
        self.device = advance(self.device, jnp.asarray(first, jnp.int32))

    def move(self, src: int, dst: int, _c: int) -> None:
        model = self.model
        if src != dst and model.held[dst]:
            return  # the host moves onto empty slots only
        self.device = move(self.device, jnp.int32(src), jnp.int32(dst))
        if src != dst:
            for array in (model.rows, model.first, model.held, model.length):
                values: Any = array
                values[dst] = values[src]
            model.rows[src] = {}
            model.first[src] = model.held[src] = model.length[src] = 0

    def agree(self) -> None:
        device, model = jax.device_get(self.device), self.model
        table = np.zeros((SLOTS, PER_SLOT), np.int32)
        for slot, row in enumerate(model.rows):
            for index, page in row.items():
                table[slot, index] = page
        np.testing.assert_array_equal(device.table, table)
        assert device.first.tolist() == model.first and device.held.tolist() == model.held
        assert device.free_stack[: device.free_top].tolist() == model.free
        rows = {page for row in model.rows for page in row.values()}
        everywhere = sorted([*model.free, *rows, *model.away])
        assert everywhere == list(range(1, PAGES)), "each page is in exactly one place"


KINDS = ["grow", "grow", "grow", "push", "clear", "share", "advance", "move"]
operations = st.tuples(
    st.sampled_from(KINDS), st.integers(0, 3), st.integers(0, 3), st.integers(0, 40)
)


@settings(
    max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
@given(st.lists(operations, max_size=40))
def test_device_and_model_agree_on_every_trace(trace: list[tuple[str, int, int, int]]) -> None:
    both = Both()
    for operation in trace:
        both.play(*operation)


def test_an_empty_pool_offers_every_page_but_the_trash_page() -> None:
    pages = empty_pages(DIMS, DIMS.groups[0])
    top = int(pages.free_top)
    assert sorted(np.asarray(pages.free_stack)[:top].tolist()) == list(range(1, PAGES))
    assert pages.free_stack.shape == (PAGES + DIMS.returns,), "a push is one write in bounds"


def test_a_push_onto_a_full_stack_stays_in_bounds() -> None:
    pages = empty_pages(DIMS, DIMS.groups[0])
    garbage = jnp.full((DIMS.returns,), 7, jnp.int32)
    after = push(pages, garbage, jnp.int32(0))
    top = int(pages.free_top)
    assert int(after.free_top) == top
    np.testing.assert_array_equal(after.free_stack[:top], pages.free_stack[:top])


def test_two_new_rows_may_begin_with_the_same_page() -> None:
    pages = empty_pages(DIMS, DIMS.groups[0])
    after = share(
        pages,
        jnp.array([2, 0], jnp.int32),
        jnp.array([True, True]),
        jnp.array([0, 1], jnp.int32),
        jnp.array([2, 3], jnp.int32),
        padded([5, 6, 6, 9], DIMS.returns, filler=88),
    )
    assert np.asarray(after.table[2]).tolist() == [5, 6, 0, 0, 0, 0]
    assert np.asarray(after.table[0]).tolist() == [0, 6, 9, 0, 0, 0]
    assert np.asarray(after.held).tolist() == [3, 0, 2, 0]
