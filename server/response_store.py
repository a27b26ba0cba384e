"""ResponseStore: responses that can be asked for again, shared by all API processes.

One SQLite file in the folder of the engine's sockets, which only this user can enter and which ends
with the server. The next request of a conversation may reach another API process than the last: a
file is found by all of them, outlives one that ends, and needs no further process. What was used
longest ago goes first when there are too many, or too many bytes; the rest goes after its time.
"""

import asyncio
import os
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from octavo.server.protocol.responses import ResponseObject

FILE = "responses.sqlite"
OPEN_PATIENCE = 5.0  # seconds
ENDED = ("completed", "incomplete", "failed", "cancelled")
SCHEMA = """
CREATE TABLE IF NOT EXISTS responses (
    id TEXT PRIMARY KEY, used REAL, expires REAL, size INTEGER, ended INTEGER, owner INTEGER,
    cancel INTEGER DEFAULT 0, streams INTEGER, response BLOB, items BLOB);
CREATE INDEX IF NOT EXISTS by_use ON responses (used) WHERE ended;
CREATE INDEX IF NOT EXISTS by_time ON responses (expires) WHERE ended;
CREATE TABLE IF NOT EXISTS totals (one INTEGER PRIMARY KEY, count INTEGER, size INTEGER);
INSERT OR IGNORE INTO totals VALUES (1, 0, 0);
CREATE TRIGGER IF NOT EXISTS one_more AFTER INSERT ON responses
    BEGIN UPDATE totals SET count = count + 1, size = size + NEW.size; END;
CREATE TRIGGER IF NOT EXISTS another_size AFTER UPDATE OF size ON responses
    BEGIN UPDATE totals SET size = size + NEW.size - OLD.size; END;
CREATE TRIGGER IF NOT EXISTS one_less AFTER DELETE ON responses
    BEGIN UPDATE totals SET count = count - 1, size = size - OLD.size; END;
CREATE TABLE IF NOT EXISTS events (
    id TEXT, number INTEGER, frames BLOB, PRIMARY KEY (id, number)) WITHOUT ROWID;
CREATE TRIGGER IF NOT EXISTS no_events AFTER DELETE ON responses
    BEGIN DELETE FROM events WHERE id = OLD.id; END;
"""
T = TypeVar("T")


@dataclass(frozen=True)
class Limits:
    """How much is kept, and for how long."""

    count: int  # 0: nothing is kept
    size: int  # bytes
    seconds: float


@dataclass(frozen=True)
class Stored:
    """One response, and the items of the whole conversation that it answers."""

    response: ResponseObject
    items: list[dict[str, Any]]
    streams: bool  # its events are kept


class ResponseStore:
    """All methods may be called from one event loop; one thread does the work."""

    def __init__(self, folder: str | None, limits: Limits) -> None:
        """`folder` is shared by the API processes; None keeps everything in memory."""
        self.limits = limits
        self._path = os.path.join(folder, FILE) if folder else ":memory:"
        self._thread = ThreadPoolExecutor(1, "responses")
        self._opened: sqlite3.Connection | None = None  # on first use, by its thread

    @property
    def _db(self) -> sqlite3.Connection:
        if self._opened is None:
            self._opened = self._open()
        return self._opened

    def _open(self) -> sqlite3.Connection:
        database = sqlite3.connect(
            self._path, timeout=10.0, isolation_level=None, check_same_thread=False
        )
        end = time.monotonic() + OPEN_PATIENCE
        while True:
            try:
                database.execute("PRAGMA journal_mode=WAL")
                database.execute("PRAGMA synchronous=OFF")  # it ends with the server anyway
                database.executescript(SCHEMA)
                return database
            except sqlite3.OperationalError:  # another process is just opening it
                if time.monotonic() > end:
                    raise
                time.sleep(0.01)

    async def _do(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    async def put(
        self, response: ResponseObject, items: list[dict[str, Any]], streams: bool = False
    ) -> None:
        """Keep it, or what it has become."""
        if self.limits.count == 0:
            return
        ended = response.status in ENDED
        body, rest = msgspec.json.encode(response), msgspec.json.encode(items)
        await self._do(lambda: self._put(response.id, ended, streams, body, rest))

    def _put(self, name: str, ended: bool, streams: bool, body: bytes, items: bytes) -> None:
        now = time.time()
        row = (now, now + self.limits.seconds, len(body) + len(items), ended, os.getpid(), streams)
        self._db.execute(
            "INSERT INTO responses "
            "(id, used, expires, size, ended, owner, streams, response, items) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO UPDATE SET used = ?2, "
            "size = ?4 + (SELECT coalesce(sum(length(frames)), 0) FROM events WHERE id = ?1), "
            "ended = ?5, response = ?8, items = ?9",
            (name, *row, body, items),
        )
        self._trim(now)

    def _trim(self, now: float) -> None:
        self._db.execute("DELETE FROM responses WHERE expires < ? AND ended", (now,))
        oldest = "SELECT id FROM responses WHERE ended ORDER BY used LIMIT 1"
        while True:
            count, size = self._db.execute("SELECT count, size FROM totals").fetchone()
            if count <= self.limits.count and size <= self.limits.size:
                return
            dropped = self._db.execute(f"DELETE FROM responses WHERE id = ({oldest})").rowcount
            if not dropped:
                return  # all the others are worked on

    async def get(self, name: str) -> Stored | None:
        """None when it was never kept, or is no more."""
        return await self._do(lambda: self._get(name))

    def _get(self, name: str) -> Stored | None:
        found = self._db.execute(
            "SELECT response, items, streams, ended, owner FROM responses "
            "WHERE id = ? AND (expires >= ? OR NOT ended)",
            (name, time.time()),
        ).fetchone()
        if found is None:
            return None
        body, items, streams, ended, owner = found
        response = msgspec.json.decode(body, type=ResponseObject)
        if not ended and not _lives(owner):
            response.status = "failed"
            message = "the process that worked on it has ended"
            response.error = {"code": "server_error", "message": message}
            body = msgspec.json.encode(response)
            self._db.execute(
                "UPDATE responses SET response = ?, ended = 1 WHERE id = ?", (body, name)
            )
        self._db.execute("UPDATE responses SET used = ? WHERE id = ?", (time.time(), name))
        return Stored(response, msgspec.json.decode(items), bool(streams))

    async def delete(self, name: str) -> bool:
        """Whether it was there. Work on it ends too, in whichever process."""
        sql = "DELETE FROM responses WHERE id = ?"
        return await self._do(lambda: self._db.execute(sql, (name,)).rowcount > 0)

    async def ask_to_cancel(self, name: str) -> None:
        """The process that works on it will look."""
        sql = "UPDATE responses SET cancel = 1 WHERE id = ?"
        await self._do(lambda: self._db.execute(sql, (name,)))

    async def unwanted(self, names: list[str]) -> list[str]:
        """Those of `names` that somebody cancelled or deleted."""
        marks = ", ".join("?" * len(names))
        sql = f"SELECT id FROM responses WHERE id IN ({marks}) AND NOT cancel"
        wanted = await self._do(lambda: {row[0] for row in self._db.execute(sql, names)})
        return [name for name in names if name not in wanted]

    async def append(self, name: str, number: int, frames: bytes) -> None:
        """Keep events; `number` is that of the first."""
        await self._do(lambda: self._append(name, number, frames))

    def _append(self, name: str, number: int, frames: bytes) -> None:
        self._db.execute(
            "INSERT INTO events SELECT ?, ?, ? WHERE EXISTS (SELECT 1 FROM responses WHERE id = ?)",
            (name, number, frames, name),
        )
        size = (len(frames), name)
        self._db.execute("UPDATE responses SET size = size + ? WHERE id = ?", size)

    async def events(self, name: str, after: int) -> tuple[bytes, int, bool]:
        """Kept events behind number `after`, the last one's number, whether there will be more."""
        return await self._do(lambda: self._events(name, after))

    def _events(self, name: str, after: int) -> tuple[bytes, int, bool]:
        row = self._db.execute("SELECT ended FROM responses WHERE id = ?", (name,)).fetchone()
        more = row is not None and not row[0]  # read before the events: none is missed
        first = "SELECT max(number) FROM events WHERE id = ? AND number <= ?"
        begin = self._db.execute(first, (name, after + 1)).fetchone()[0] or 0
        sql = "SELECT number, frames FROM events WHERE id = ? AND number >= ? ORDER BY number"
        made = []
        for number, frames in self._db.execute(sql, (name, begin)):
            for i, frame in enumerate(frames.split(b"\n\n")[:-1]):
                if number + i > after:
                    made.append(frame + b"\n\n")
        return b"".join(made), after + len(made), more

    def close(self) -> None:
        """Whatever comes after waits for nothing."""
        if self._opened is not None:
            self._thread.submit(self._opened.close)
        self._thread.shutdown(wait=True)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
