"""The door: takes each request whole, has a replica answer it, and asks another when that one ends.

What reaches the client before the replica was lost decides what can be done. An answer that is no
stream is held until it is whole, so it can be asked for again and the client never knows. Of a
stream something was seen already: it ends with an error event in the words of its API.
"""

import asyncio
import json
import logging
import re
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing

from starlette.types import Message, Receive, Scope, Send

from octavo.server.message_events import failure
from octavo.server.protocol.errors import ApiError, unavailable
from octavo.server.replicas.exchange import Answer, Head, Order
from octavo.server.replicas.merged import MERGED, merged
from octavo.server.respond import MESSAGES, error_response
from octavo.server.streaming import DONE, frame

PAUSE = 0.1  # seconds before another replica is asked, doubled each time
BROADCAST_TIME = 10.0  # seconds that replicas have to tell of themselves
RESPONSES = "/v1/responses"
LOST = "the replica that worked on this request ended; ask again"
_SEQUENCE = re.compile(rb'"sequence_number":(\d+)')
logger = logging.getLogger("octavo.server")


class ReplicaLost(Exception):
    """A replica ended, or its engine did, before it had answered."""


Ask = Callable[[Order], AsyncIterator[Head | bytes]]
AskAll = Callable[[Order], Awaitable[Sequence[Answer]]]


class Door:
    """An ASGI application over `ask` (any replica answers) and `ask_all` (each of them does).

    `ask` raises ReplicaLost when the replica it chose is gone, and ApiError when there is none.
    """

    def __init__(self, ask: Ask, ask_all: AskAll, *, retries: int, max_body_bytes: int) -> None:
        self._ask, self._ask_all = ask, ask_all
        self._retries, self._max_body_bytes = retries, max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; whoever leaves takes the work along."""
        if scope["type"] != "http":
            return
        try:
            order = await self._order(scope, receive)
            if order.method == "GET" and order.path in MERGED:
                await _send_whole(send, *await self._together(order))
                return
            await self._pass_on(order, receive, send)
        except ApiError as error:
            await error_response(error, scope["path"])(scope, receive, send)

    async def _order(self, scope: Scope, receive: Receive) -> Order:
        body, more = bytearray(), True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ApiError(499, "the client left before its body was whole")
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self._max_body_bytes:
                limit = self._max_body_bytes
                raise ApiError(413, f"the body has more than the limit of {limit} bytes")
        path, query = scope["path"], scope.get("query_string", b"")
        return Order(scope["method"], path, query, list(scope["headers"]), bytes(body))

    async def _together(self, order: Order) -> tuple[Head, bytes]:
        try:
            answers = await asyncio.wait_for(self._ask_all(order), BROADCAST_TIME)
        except TimeoutError:
            raise unavailable("the replicas do not answer", 1) from None
        if not answers:
            raise unavailable("no replica runs yet", 1)
        one = merged(order.path, answers)
        return one.head, one.body

    async def _pass_on(self, order: Order, receive: Receive, send: Send) -> None:
        work = asyncio.ensure_future(self._answer(order, send))
        left = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait((work, left), return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
        finally:
            for task in (work, left):
                task.cancel()
            await asyncio.gather(work, left, return_exceptions=True)

    async def _answer(self, order: Order, send: Send) -> None:
        for attempt in range(self._retries + 1):
            stream = _Stream(order, send)
            try:
                await self._ask_one(order, stream)
                return
            except ReplicaLost as lost:
                logger.warning("a replica was lost (attempt %d): %s", attempt + 1, lost)
                if stream.begun:
                    await stream.fail(ApiError(500, LOST))
                    return
            except Exception as error:
                if not isinstance(error, ApiError):
                    logger.exception("a request failed at the door")
                    error = ApiError(500, "internal error; the server's log has the details")
                if not stream.begun:
                    raise error from None
                await stream.fail(error)
                return
            await asyncio.sleep(PAUSE * 2**attempt)
        raise unavailable(f"{self._retries + 1} replicas ended while they worked on this", 1)

    async def _ask_one(self, order: Order, stream: "_Stream") -> None:
        head, body = None, bytearray()
        async with aclosing(self._ask(order)) as pieces:  # type: ignore[type-var]
            async for piece in pieces:
                if isinstance(piece, Head):
                    head = piece
                    if head.streams:
                        await stream.begin(head)
                elif stream.begun:
                    await stream.pass_on(piece)
                else:
                    body += piece
        if head is None:
            raise ReplicaLost("it answered nothing")
        if stream.begun:
            await stream.end()
        else:
            await _send_whole(stream.send, head, bytes(body))


class _Stream:
    """Events on their way to one client."""

    def __init__(self, order: Order, send: Send) -> None:
        self._path, self.send = order.path, send
        self.begun = False
        self._sequence = 0  # of the last event, where events are numbered

    async def begin(self, head: Head) -> None:
        self.begun = True
        await self.send(_start(head))

    async def pass_on(self, chunk: bytes) -> None:
        if self._path.startswith(RESPONSES):
            for number in _SEQUENCE.findall(chunk):
                self._sequence = int(number)
        await self.send({"type": "http.response.body", "body": chunk, "more_body": True})

    async def end(self, last: bytes = b"") -> None:
        await self.send({"type": "http.response.body", "body": last, "more_body": False})

    async def fail(self, error: ApiError) -> None:
        """An error event, as clients of this path know it, and the end."""
        if self._path.startswith(MESSAGES):
            await self.end(failure(error, f"req_{uuid.uuid4().hex}"))
        elif self._path.startswith(RESPONSES):
            event = {"type": "error", "code": "server_error", "message": error.message}
            event |= {"param": None, "sequence_number": self._sequence + 1}  # type: ignore[dict-item]
            await self.end(b"event: error\ndata: " + json.dumps(event).encode() + b"\n\n")
        else:
            await self.end(frame(error) + DONE)


def _start(head: Head) -> Message:
    return {"type": "http.response.start", "status": head.status, "headers": head.headers}


async def _send_whole(send: Send, head: Head, body: bytes) -> None:
    await send(_start(head))
    await send({"type": "http.response.body", "body": body, "more_body": False})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
