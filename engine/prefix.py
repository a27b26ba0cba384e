"""The prefix index: which page holds which tokens, so that prompts that begin alike share pages.

Only full pages are indexed, by a chained hash: a page's name covers every token before it. The
chain starts from the salt, the adapter and the cache's dtype, so pages are shared only where they
are equal. Host code: no jax, no clock.
"""

import hashlib
from collections import OrderedDict

import numpy as np


def seed_hash(salt: str, adapter: int, kv_dtype: str) -> bytes:
    """The name of the empty prefix. Requests with different salts never share a page."""
    return hashlib.sha256(f"{adapter}|{kv_dtype}|{salt}".encode()).digest()


def extend_hashes(
    hashes: list[bytes], seed: bytes, tokens: np.ndarray, pages: int, size: int
) -> None:
    """Extend a chain of page names until it covers `pages` full pages of `tokens` (i32)."""
    parent = hashes[-1] if hashes else seed
    for page in range(len(hashes), pages):
        parent = hashlib.sha256(parent + tokens[page * size : (page + 1) * size].tobytes()).digest()
        hashes.append(parent)


class PrefixIndex:
    """One group's index: name to page, and the pages no row uses in order of their last use."""

    def __init__(self) -> None:
        self._page: dict[bytes, int] = {}
        self._name: dict[int, bytes] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()

    def __contains__(self, page: int) -> bool:
        return page in self._name

    def __len__(self) -> int:
        return len(self._name)

    @property
    def idle(self) -> int:
        """Pages that could be evicted now."""
        return len(self._idle)

    def find(self, name: bytes) -> int:
        """The page that holds these tokens, or 0."""
        return self._page.get(name, 0)

    def insert(self, name: bytes, page: int) -> None:
        """Name a page that a row uses. On equal names the first wins, the other stays private."""
        if name not in self._page and page not in self._name:
            self._page[name] = page
            self._name[page] = name

    def use(self, page: int) -> None:
        """A row uses the page: it cannot be evicted."""
        self._idle.pop(page, None)

    def rest(self, page: int) -> None:
        """No row uses the page any more; it is the youngest of the idle."""
        self._idle[page] = None

    def evict(self) -> int:
        """Forget the page that was idle longest and return it; 0 when none is idle."""
        if not self._idle:
            return 0
        page, _ = self._idle.popitem(last=False)
        del self._page[self._name.pop(page)]
        return page

    def evict_all(self) -> list[int]:
        """Forget every idle page."""
        return [self.evict() for _ in range(len(self._idle))]

    def pages(self) -> list[int]:
        """Every indexed page, for checks."""
        return list(self._name)

    def idle_pages(self) -> list[int]:
        """Every idle page, the oldest first, for checks."""
        return list(self._idle)
