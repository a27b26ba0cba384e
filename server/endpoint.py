"""Endpoint: one row of the table of routes."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from octavo.server.protocol.errors import ErrorResponse


@dataclass(frozen=True)
class Endpoint:
    """One path and method."""

    path: str
    handler: Callable[[Request], Awaitable[Response]]
    summary: str
    body: Any = None  # the msgspec type of the request's body
    answer: Any = None  # of the response's body; None: not JSON
    method: str = "GET"
    media_type: str = ""  # of an answer that is not JSON
    error: Any = ErrorResponse  # the type of a refusal
    streams: bool = False  # `stream: true` answers with server-sent events

    def route(self) -> Route:
        return Route(self.path, self.handler, methods=[self.method])


def post(
    path: str,
    handler: Any,
    summary: str,
    body: Any,
    answer: Any,
    streams: bool = False,
    error: Any = ErrorResponse,
) -> Endpoint:
    return Endpoint(path, handler, summary, body, answer, "POST", streams=streams, error=error)
