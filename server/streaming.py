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

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sender = asyncio.ensure_future(self._send_all(send))
        watcher = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait((sender, watcher), return_when=asyncio.FIRST_COMPLETED)
            if sender.done():
                sender.result()
        finally:
            self._on_end()
            for task in (sender, watcher):
                task.cancel()
            await asyncio.gather(sender, watcher, return_exceptions=True)

    async def _send_all(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        try:
            async for chunk in self._chunks:
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
