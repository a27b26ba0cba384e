"""What a connection may do: uvicorn's HTTP/1.1 protocol with limits on size and time.

Whoever sends too much or too slowly gets 431 or 408 in OpenAI's shape and is cut off; nothing of it
reaches a route. The application has one fast way out: `scope["octavo.write"]` writes a chunk of an
answer that has begun, without a coroutine.

    head  from the first byte, or the connection, to the end of the headers: header_timeout in all
    body  while it is not whole: 1 KiB at least in every body_timeout
    idle  uvicorn's own keep-alive time-out
"""

import asyncio
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from octavo.server.protocol.errors import ApiError

SLOWEST_BODY = 1024  # bytes in every body_timeout
LINGER = 2.0  # seconds in which a refused client may read why, before the connection is closed
PADDING = 8  # bytes that may surround each byte of a chunked body
_UPGRADE = re.compile(rb"\r\nupgrade:", re.IGNORECASE)


@dataclass(frozen=True)
class WireLimits:
    """Of one connection; sizes in bytes, times in seconds."""

    header_bytes: int
    header_count: int
    header_timeout: float
    body_timeout: float
    write_timeout: float
    on_refusal: Callable[[int], None] = lambda status: None


def protocol_within(limits: WireLimits) -> type[asyncio.Protocol]:
    """The protocol class for uvicorn."""
    return type("LimitedProtocol", (_LimitedProtocol,), {"limits": limits})


class _Refused(Exception):
    """Raised inside a parser's callback: the message is not read further."""


class _LimitedProtocol(HttpToolsProtocol):
    limits: WireLimits

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._reading: str | None = None  # "head" or "body" of the message that is coming
        self._raw = self._taken = self._window = 0  # bytes: come, of the body, since the last look
        self._head_size = 0  # bytes of the headers parsed so far
        self._refusal: ApiError | None = None
        self._refused = False
        self._timer: asyncio.TimerHandle | None = None
        self._stall: asyncio.TimerHandle | None = None
        self._arm(self.limits.header_timeout, self._head_late)

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        if self._stall is not None:
            self._stall.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        if self._reading != "body":
            if self._timer is None and (self.cycle is None or self.cycle.response_complete):
                self._arm(self.limits.header_timeout, self._head_late)
            if b"pgrade:" in data:  # an offer of another protocol: not taken, and no end of parsing
                data = _UPGRADE.sub(b"\r\nx-upgrade:", data)
        self._raw += len(data)
        self._window += len(data)
        super().data_received(data)
        around = self._raw - self._taken
        if self._reading == "head" and around > self.limits.header_bytes:
            self._refuse(self._too_large())
        elif self._reading == "body" and around > self.limits.header_bytes + PADDING * self._taken:
            self._refuse(self._too_large())

    # --- the parser's callbacks

    def on_message_begin(self) -> None:
        self._reading = "head"
        self._raw = self._taken = self._head_size = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value) + 4)
        super().on_header(name, value)
        if len(self.headers) > self.limits.header_count:
            self._refusal = ApiError(
                431, f"the request has more than {self.limits.header_count} headers"
            )
            raise _Refused

    def on_headers_complete(self) -> None:
        self._reading = "body"
        self._disarm()
        self._window = self._taken = self._raw = 0
        super().on_headers_complete()
        self.scope["octavo.write"] = self._writer()  # type: ignore[typeddict-unknown-key]
        self._arm(self.limits.body_timeout, self._body_late)

    def on_body(self, body: bytes) -> None:
        self._taken += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._reading = None
        self._disarm()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._reading == "body":  # answered before the body was whole: it may still come
            self._arm(LINGER, self.transport.close)
        elif self._reading == "head":  # the next request has begun
            self._arm(self.limits.header_timeout, self._head_late)

    # --- limits

    def _count(self, size: int) -> None:
        self._head_size += size
        if self._head_size > self.limits.header_bytes:
            self._refusal = self._too_large()
            raise _Refused

    def _too_large(self) -> ApiError:
        return ApiError(
            431, f"the headers have more than the limit of {self.limits.header_bytes} bytes"
        )

    def _head_late(self) -> None:
        self._timer = None
        if self._reading is None:  # not a byte of a request: an idle connection
            self.transport.close()
            return
        limit = self.limits.header_timeout
        self._refuse(ApiError(408, f"the headers were not whole after {limit:g} s"))

    def _body_late(self) -> None:
        self._timer = None
        limit = self.limits.body_timeout
        if self._window >= SLOWEST_BODY or self.flow.read_paused:  # paused: we are the slow ones
            self._window = 0
            self._arm(limit, self._body_late)
        else:
            self._refuse(
                ApiError(408, f"the body was not whole, and in {limit:g} s hardly any of it came")
            )

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._stall is None:
            self._stall = self.loop.call_later(self.limits.write_timeout, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None

    def _arm(self, seconds: float, then: Callable[[], None]) -> None:
        self._disarm()
        self._timer = self.loop.call_later(seconds, then)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # --- answers

    def send_400_response(self, msg: str) -> None:
        """uvicorn's word for what its parser cannot read; ours may know better why."""
        self._refuse(self._refusal or ApiError(400, "this is not an HTTP/1.1 request"))

    def _refuse(self, error: ApiError) -> None:
        """Say why, if nothing else was said, and end the connection once the client could read."""
        if self._refused or self.transport.is_closing():
            return
        self._refused = True
        self.limits.on_refusal(error.status)
        cycle = self.cycle
        running = cycle is not None and not cycle.response_complete
        if running:
            cycle.disconnected = True
            cycle.message_event.set()
        if running and cycle.response_started:
            self.transport.close()
            return
        self.transport.write(_answer(error))
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._arm(LINGER, self.transport.close)

    def _writer(self) -> Callable[[bytes], bool]:
        cycle, flow, write = self.cycle, self.flow, self.transport.write

        def write_chunk(chunk: bytes) -> bool:
            """Write to an answer that has begun; False: it must go through `send`."""
            if not cycle.chunked_encoding or cycle.response_complete:
                return False
            if flow.write_paused or cycle.disconnected:
                return False
            write(b"%x\r\n%b\r\n" % (len(chunk), chunk))
            return True

        return write_chunk


def _answer(error: ApiError) -> bytes:
    body = msgspec.json.encode(error.body())
    head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n"
    return STATUS_LINE[error.status] + head % len(body) + body
