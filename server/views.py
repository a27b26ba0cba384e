"""Views of the engine for whoever watches through this process: the newest one, never a queue.

While anybody watches, the engine is asked again every second for views of the next few; one that
is not asked again stops by itself.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable

import msgspec
import numpy as np

from octavo.engine.messages import PageMap, View, Watch
from octavo.server.protocol.errors import unavailable

EVERY = 0.2  # seconds between two views
LEASE, RENEW = 4.0, 1.0  # seconds asked for, and between two times of asking
MOST_WATCHERS = 32  # of one process
RETRY_AFTER = 10  # seconds


class Watcher:
    """One reader's place: it gets the newest view, with the hits of those that it missed."""

    def __init__(self) -> None:
        self.closed = False
        self._view: View | None = None
        self._news = asyncio.Event()

    def put(self, view: View) -> None:
        self._view = view if self._view is None else _with_hits(view, self._view)
        self._news.set()

    def close(self) -> None:
        self.closed = True
        self._news.set()

    async def take(self, patience: float) -> View | None:
        """The newest view; None when none comes within `patience` seconds."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._news.wait(), patience)
        self._news.clear()
        view, self._view = self._view, None
        return view


class Views:
    """Those who watch through this process, and the asking on their behalf."""

    def __init__(self, ask: Callable[[Watch], None]) -> None:
        self._ask = ask
        self._watchers: set[Watcher] = set()
        self._asking: asyncio.Task[None] | None = None
        self._closed = False

    def check_room(self) -> None:
        """ApiError 503 when as many watch already as one process takes."""
        if self._closed:
            raise unavailable("the server is shutting down")
        if len(self._watchers) >= MOST_WATCHERS:
            raise unavailable(
                f"{MOST_WATCHERS} readers watch the engine already, the most of one process: "
                "close one, or read /metrics",
                RETRY_AFTER,
            )

    async def watch(self) -> AsyncGenerator[View | None]:
        """Views as they come, until `close`; None after a second without one."""
        watcher = Watcher()
        watcher.closed = self._closed
        self._watchers.add(watcher)
        if self._asking is None:
            self._asking = asyncio.get_running_loop().create_task(self._keep_asking())
        try:
            while not watcher.closed:
                yield await watcher.take(RENEW)
        finally:
            self._watchers.discard(watcher)
            if not self._watchers and self._asking is not None:
                self._asking.cancel()
                self._asking = None
                self._ask(Watch(0.0))

    def put(self, view: View) -> None:
        """A view came; called by the client's reader."""
        for watcher in self._watchers:
            watcher.put(view)

    def close(self) -> None:
        """Let everybody go: the server stops."""
        self._closed = True
        for watcher in self._watchers:
            watcher.close()

    async def _keep_asking(self) -> None:
        while True:
            self._ask(Watch(LEASE, EVERY))
            await asyncio.sleep(RENEW)


def _with_hits(view: View, missed: View) -> View:
    """`view` with the hits of one that nobody took."""

    def both(new: PageMap, old: PageMap) -> PageMap:
        hits = np.union1d(np.frombuffer(new.hits, "<u4"), np.frombuffer(old.hits, "<u4"))
        return msgspec.structs.replace(new, hits=hits.astype("<u4").tobytes())

    if len(view.maps) != len(missed.maps):
        return view
    return msgspec.structs.replace(view, maps=list(map(both, view.maps, missed.maps)))
