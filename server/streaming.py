"""Answers that outlive one write: server-sent events, and work that its reader owns.

A reader who leaves takes the work along: both forms listen for the disconnect while they run, and
cancel what they were asked to own.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from octavo.server.protocol.errors import ApiError

T = TypeVar("T")
DONE = b"data: [DONE]\n\n"
COMMENT = b": still here\n\n"
HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # proxies that would collect the events before passing them on
]
logger = logging.getLogger("octavo.server")


class EventStream(Response):
    """Sends byte chunks as they come, each already a whole `data: ...` frame or several.

    `chunks` is closed on disconnect, so its `finally` frees what it holds. An error after the first
    byte can have no status any more: it becomes a frame, then [DONE]. `done` is what comes last.
    While nothing comes, comments go out at the interval of the settings, so that nobody between
    here and the client takes the silence of a queue for the end.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        chunks: AsyncIterator[bytes],
        on_end: Callable[[], None],
        request_id: str,
        done: bytes = DONE,
    ) -> None:
        self.status_code = 200
        self.background = None
        self.raw_headers = [*HEADERS, (b"x-request-id", request_id.encode("latin-1", "replace"))]
        self._chunks, self._on_end, self._done = chunks, on_end, done
        self._sent = 0  # chunks, to see whether any went out since the last look

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        write: Callable[[bytes], bool] = scope.get("octavo.write", _cannot_write)
        interval = scope["app"].state.frontend.settings.sse_keep_alive_interval
        tasks = [
            asyncio.ensure_future(self._send_all(send, write)),
            asyncio.ensure_future(_disconnected(receive)),
        ]
        beat = KeepAlive(self, write, interval) if interval else None
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if tasks[0].done():
                tasks[0].result()
        finally:
            if beat is not None:
                beat.stop()
            self._on_end()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _send_all(self, send: Send, write: Callable[[bytes], bool]) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        try:
            async for chunk in self._chunks:
                if not chunk:  # an empty one would say that the body ends
                    continue
                self._sent += 1
                if not write(chunk):  # it waits for the reader, or there is no short way
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
        except ApiError as error:
            await send({"type": "http.response.body", "body": frame(error), "more_body": True})
        except OSError:
            return  # the connection is gone, nobody is left to tell
        except Exception:
            logger.exception("a stream failed")
            failure = ApiError(500, "internal error; the server's log has the details")
            await send({"type": "http.response.body", "body": frame(failure), "more_body": True})
        await send({"type": "http.response.body", "body": self._done, "more_body": False})

    @property
    def sent(self) -> int:
        """Chunks so far."""
        return self._sent


class KeepAlive:
    """Writes a comment into a stream whenever nothing else went out for `interval` seconds."""

    def __init__(
        self, stream: EventStream, write: Callable[[bytes], bool], interval: float
    ) -> None:
        self._stream, self._write, self._interval = stream, write, interval
        self._seen = 0
        self._next = asyncio.get_running_loop().call_later(interval, self._look)

    def _look(self) -> None:
        if self._stream.sent == self._seen:
            self._write(COMMENT)
        self._seen = self._stream.sent
        self._next = asyncio.get_running_loop().call_later(self._interval, self._look)

    def stop(self) -> None:
        self._next.cancel()


def _cannot_write(_: bytes) -> bool:
    return False


def frame(error: ApiError) -> bytes:
    """An error as one server-sent event."""
    return b"data: " + msgspec.json.encode(error.body()) + b"\n\n"


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def while_connected(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`, cancelled when the client leaves first (ApiError 499)."""
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnected(request.receive))
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(499, "the client left")
        return task.result()
    finally:
        for leftover in (task, watcher):
            leftover.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(task, watcher, return_exceptions=True)
