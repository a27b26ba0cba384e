"""One HTTP request as data, and the answer of an application to it as a stream of pieces.

So a request can be asked again elsewhere, and an answer can cross processes.
"""

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass

from starlette.types import ASGIApp, Message

ROOM = 64  # pieces that may wait for the reader before the application has to
logger = logging.getLogger("octavo.server")
Headers = list[tuple[bytes, bytes]]


@dataclass(frozen=True)
class Order:
    """A whole request."""

    method: str
    path: str
    query: bytes
    headers: Headers
    body: bytes


@dataclass(frozen=True)
class Head:
    """How an answer begins."""

    status: int
    headers: Headers

    @property
    def streams(self) -> bool:
        """Whether events follow: they are passed on as they come."""
        return any(
            name.lower() == b"content-type" and value.startswith(b"text/event-stream")
            for name, value in self.headers
        )


@dataclass(frozen=True)
class Answer:
    """A whole answer, and who gave it."""

    head: Head
    body: bytes
    replica: str


async def answer(app: ASGIApp, order: Order) -> AsyncIterator[Head | bytes]:
    """A Head, then bytes. Closing it early tells the application that its client left."""
    pipe = _Pipe(order)
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": order.method,
        "scheme": "http",
        "path": order.path,
        "raw_path": order.path.encode(),
        "root_path": "",
        "query_string": order.query,
        "headers": order.headers,
        "client": None,
        "server": None,
        "octavo.write": pipe.write,
    }
    task = asyncio.ensure_future(app(scope, pipe.receive, pipe.send))
    task.add_done_callback(lambda _: pipe.end())
    try:
        while (piece := await pipe.take()) is not None:
            yield piece
        if task.exception() is not None:
            logger.error("an answer was cut off", exc_info=task.exception())
    finally:
        pipe.leave()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await task


async def whole(app: ASGIApp, order: Order, replica: str = "") -> Answer:
    """The same, all at once."""
    head, body = Head(500, []), bytearray()
    async for piece in answer(app, order):
        if isinstance(piece, Head):
            head = piece
        else:
            body += piece
    return Answer(head, bytes(body), replica)


class _Pipe:
    """Between an application that writes and a reader that may be slower: bytes that pile up are
    joined, and the application waits when there are too many of them."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self._asked = False
        self._gone = asyncio.Event()
        self._pieces: deque[Head | bytes] = deque()
        self._filled, self._room = asyncio.Event(), asyncio.Event()
        self._room.set()
        self._ended = False

    async def receive(self) -> Message:
        """The body, then, when the reader has left, the disconnect."""
        if not self._asked:
            self._asked = True
            return {"type": "http.request", "body": self._order.body, "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._put(Head(message["status"], list(message.get("headers", ()))))
        elif message.get("body"):
            await self._room.wait()
            self._put(bytes(message["body"]))

    def write(self, chunk: bytes) -> bool:
        """The short way of streams: False when the reader must be waited for."""
        if not self._room.is_set():
            return False
        self._put(chunk)
        return True

    def end(self) -> None:
        self._ended = True
        self._filled.set()

    def leave(self) -> None:
        self._gone.set()
        self._room.set()

    async def take(self) -> Head | bytes | None:
        """The next piece; None at the end."""
        await self._filled.wait()
        if not self._pieces:
            return None  # ended: nothing else sets it without a piece
        first = self._pieces.popleft()
        if not isinstance(first, Head):
            joined = [first]
            while self._pieces and isinstance(piece := self._pieces[0], bytes):
                joined.append(piece)
                self._pieces.popleft()
            first = b"".join(joined)
        if not self._pieces and not self._ended:
            self._filled.clear()
        self._room.set()
        return first

    def _put(self, piece: Head | bytes) -> None:
        self._pieces.append(piece)
        self._filled.set()
        if len(self._pieces) >= ROOM:
            self._room.clear()
