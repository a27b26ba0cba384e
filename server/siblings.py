"""How the API processes of one server know each other's figures: through a file of each.

Every process writes what it counted, twice a second, into the engine's folder, and reads what the
others wrote when somebody asks for /metrics, so any of them answers for the whole server. One that
takes the place of a process that ended goes on from its file: totals never go back.
"""

import asyncio
import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import msgspec

from octavo.server.figures import Figures, Snapshot

WRITE_EVERY = 0.5  # seconds


class Siblings:
    """The figures of API process `number` of `count`, and of the others."""

    def __init__(
        self,
        figures: Figures,
        folder: str,
        number: int,
        count: int,
        open_requests: Callable[[], int],
    ) -> None:
        self._figures, self._number, self._count = figures, number, count
        self._open_requests = open_requests
        self._folder = Path(folder)
        self._task: asyncio.Task[None] | None = None
        if count > 1 and (before := self._read(number)) is not None:
            figures.add(before)

    def start(self) -> None:
        """Write from now on; needs a running event loop."""
        if self._count > 1:
            self._task = asyncio.get_running_loop().create_task(self._keep_writing())

    def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            self._write()

    def own(self) -> Snapshot:
        return self._figures.snapshot(f"api{self._number}", self._open_requests())

    def everybody(self) -> list[Snapshot]:
        """This process's figures as they are, and the others' as they last wrote them."""
        others = (self._read(i) for i in range(self._count) if i != self._number)
        return [self.own(), *(other for other in others if other is not None)]

    async def _keep_writing(self) -> None:
        while True:
            self._write()
            await asyncio.sleep(WRITE_EVERY)

    def _path(self, number: int) -> Path:
        return self._folder / f"figures-{number}"

    def _write(self) -> None:
        path = self._path(self._number)
        fresh = path.with_suffix(".new")
        with contextlib.suppress(OSError):  # the engine is gone, and its folder too
            fresh.write_bytes(msgspec.msgpack.encode(self.own()))
            os.replace(fresh, path)

    def _read(self, number: int) -> Snapshot | None:
        try:
            return msgspec.msgpack.decode(self._path(number).read_bytes(), type=Snapshot)
        except (OSError, msgspec.MsgspecError):
            return None
