"""What is known of each HTTP request while it is answered, and what is told of it at its end.

A Record is made when a request arrives and found again, by whoever works for that request, through
`current()`. At its end it becomes a count, a log line and a span, each only where it is wanted.
"""

import logging
import time
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from octavo.server.figures import Figures

if TYPE_CHECKING:
    from octavo.server.client import Generation

PROBES = frozenset({"/health", "/ping", "/ready", "/metrics", "/load"})  # never logged
UNKNOWN = "none"  # the route of what is not served here: addresses of strangers are no labels
METHODS = frozenset({"GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH"})
_current: ContextVar["Record | None"] = ContextVar("octavo_record", default=None)


class Record:
    """One HTTP request."""

    __slots__ = ("began", "wall", "method", "route", "status", "headers", "id", "generations")

    def __init__(self, scope: Scope) -> None:
        self.began = time.monotonic()
        self.wall = time.time()
        self.method: str = scope["method"] if scope["method"] in METHODS else "OTHER"
        self.route = UNKNOWN
        self.status = 500
        self.headers: list[tuple[bytes, bytes]] = scope["headers"]
        self.id = ""  # of the answer
        self.generations: list[Generation] = []


def current() -> Record | None:
    """The record of the request for which this code runs."""
    return _current.get()


class Observed:
    """Keeps the Record of each request; the outermost middleware."""

    def __init__(
        self, app: ASGIApp, figures: Figures, tell: Sequence[Callable[[Record], None]]
    ) -> None:
        self._app, self._figures, self._tell = app, figures, tell

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = Record(scope)
        _current.set(record)  # of this request's task alone

        async def note(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, note)
        finally:
            route = scope.get("route")
            if route is not None:
                record.route = route.path
            self._figures.http[record.route, record.method, str(record.status)] += 1
            for tell in self._tell:
                tell(record)


def log_line() -> Callable[[Record], None]:
    """Logs one line for a request: who, what came of it, how much, how long; never its text."""
    logger = logging.getLogger("octavo.requests")
    logger.setLevel(logging.INFO)

    def tell(record: Record) -> None:
        if record.route in PROBES:
            return
        facts = facts_of(record)
        words = (f"{name}={value}" for name, value in facts.items() if value is not None)
        logger.info(" ".join(words), extra={"facts": facts})

    return tell


def facts_of(record: Record) -> dict[str, Any]:
    """What the log says of a request; times in seconds."""
    facts: dict[str, Any] = {
        "id": record.id or "-",
        "method": record.method,
        "route": record.route,
        "status": record.status,
        "seconds": round(time.monotonic() - record.began, 4),
    }
    told = record.generations
    if told:
        first = [g.first - g.arrival for g in told if g.first]
        facts |= {
            "prompt_tokens": sum(g.prompt_tokens for g in told),
            "cached_tokens": sum(g.cached_tokens for g in told),
            "output_tokens": sum(g.tokens for g in told),
            "queued": round(max(g.queued for g in told), 4),
            "first_token": round(min(first), 4) if first else None,
            "finish": ",".join(sorted({reason for g in told for reason in g.reasons})) or "-",
        }
    return facts
