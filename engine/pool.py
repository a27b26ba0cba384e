"""A page pool as the host knows it: who refers to which page, and how many are surely free.

The device pops pages by itself, so the host learns late which ones went where. `bound` is what it
may count on meanwhile: never more than the free pages the device will have after every dispatched
step. Host code: no jax, no clock.
"""

from collections.abc import Iterable

import numpy as np

from octavo.engine.prefix import PrefixIndex
from octavo.engine.state import Dims, PageGroup


class Pool:
    """One page group's pages. Arrays mirror the device as of the last harvested step."""

    def __init__(self, dims: Dims, group: PageGroup) -> None:
        self.group = group
        self.size = dims.page_size
        self.shift = dims.shift
        self.rows = np.zeros((dims.slots, dims.pages_per_slot), np.int32)  # as harvested
        self.first = np.zeros(dims.slots, np.int32)
        self.held = np.zeros(dims.slots, np.int32)
        self.sent_first = np.zeros(dims.slots, np.int32)  # window advances already dispatched
        self.references = np.zeros(group.pages, np.int32)
        self.index = PrefixIndex()
        self.evictions = 0  # since start
        self.returns: list[int] = []  # decided, in no dispatched plan yet
        self.bound = group.pages - 1
        self.free = group.pages - 1  # free_top as last harvested

    @property
    def available(self) -> int:
        """Pages that a plan built now can count on, evicting what is idle."""
        return self.bound + len(self.returns) + self.index.idle

    def take_returns(self, most: int) -> list[int]:
        """Pages for a plan to push back; the plan's dispatch makes them free."""
        out, self.returns = self.returns[:most], self.returns[most:]
        self.bound += len(out)
        return out

    def evict(self, count: int) -> None:
        """Turn up to `count` idle pages into returns, oldest first."""
        for _ in range(min(max(count, 0), self.index.idle)):
            self.returns.append(self.index.evict())
            self.evictions += 1

    def share(self, ids: Iterable[int]) -> None:
        """A new row refers to these indexed (or another row's) pages."""
        for page in ids:
            self.references[page] += 1
            self.index.use(page)

    def begin(self, slot: int, first: int, ids: np.ndarray) -> None:
        """A slot's row begins with shared pages."""
        self.rows[slot] = 0
        self.rows[slot, first : first + len(ids)] = ids
        self.first[slot] = self.sent_first[slot] = first
        self.held[slot] = first + len(ids)

    def append(self, slots: np.ndarray, pages: np.ndarray) -> None:
        """Each of these slots (all different) took one page. i32[n] both."""
        self.rows[slots, self.held[slots]] = pages
        self.held[slots] += 1
        self.references[pages] += 1

    def extend(self, slot: int, pages: np.ndarray) -> None:
        """One slot took several pages."""
        held = self.held[slot]
        self.rows[slot, held : held + len(pages)] = pages
        self.held[slot] += len(pages)
        self.references[pages] += 1

    def release(self, slot: int) -> None:
        """The slot holds nothing any more: its pages go to the index or on their way back."""
        self._drop(self.rows[slot, self.first[slot] : self.held[slot]].copy())
        self.first[slot] = self.held[slot] = self.sent_first[slot] = 0
        self.rows[slot] = 0

    def advance(self, slot: int, first: int) -> None:
        """A window moved on: the slot's pages below `first` are dropped."""
        first = min(first, int(self.held[slot]))
        old = int(self.first[slot])
        if first > old:
            self._drop(self.rows[slot, old:first].copy())
            self.rows[slot, old:first] = 0
            self.first[slot] = first

    def move(self, src: int, dst: int) -> None:
        """Row dst becomes row src."""
        self.rows[dst], self.rows[src] = self.rows[src], 0
        for array in (self.first, self.held, self.sent_first):
            array[dst], array[src] = array[src], 0

    def _drop(self, pages: np.ndarray) -> None:
        # The end of a sequence is dropped first, so that eviction, oldest first, takes tails first.
        self.references[pages] -= 1
        for page in pages[::-1].tolist():
            if self.references[page] == 0:
                if page in self.index:
                    self.index.rest(page)
                else:
                    self.returns.append(page)

    def window_first(self, length: int) -> int:
        """The first page that a query at position `length` or later can still see."""
        if not self.group.window:
            return 0
        return max(0, length - self.group.window + 1) >> self.shift
