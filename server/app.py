"""The Starlette application: which route is whose, who may ask, and how an error becomes a body."""

import hashlib
import hmac
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from octavo.server.frontend import Frontend
from octavo.server.protocol.errors import ApiError
from octavo.server.respond import error_response, unauthorized
from octavo.server.routes import chat, completions, health, models, page, tokenize

GUARDED = ("/v1", "/live")
logger = logging.getLogger("octavo.server")


class ApiKeys:
    """Lets nobody past what is GUARDED without one of the keys; compares in constant time."""

    def __init__(self, app: ASGIApp, keys: list[str]) -> None:
        self._app = app
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        guarded = scope["type"] == "http" and scope["path"].startswith(GUARDED)
        if guarded and scope["method"] != "OPTIONS" and not self._knows(scope):
            await unauthorized()(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _knows(self, scope: Scope) -> bool:
        header = dict(scope["headers"]).get(b"authorization", b"")
        scheme, _, key = header.partition(b" ")
        if scheme.lower() != b"bearer":
            return False
        digest = hashlib.sha256(key).digest()
        known = False
        for own in self._digests:  # all of them, always: time says nothing about which
            known |= hmac.compare_digest(digest, own)
        return known


async def _api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError), f"{error=}"
    return error_response(error)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException), f"{error=}"
    messages = {
        404: f"there is no {request.url.path} here; GET /v1/models lists the models",
        405: f"{request.url.path} does not take {request.method}",
    }
    return error_response(
        ApiError(error.status_code, messages.get(error.status_code, error.detail))
    )


async def _bug(_: Request, error: Exception) -> Response:
    logger.error("a request failed", exc_info=error)
    return error_response(ApiError(500, "internal error; the server's log has the details"))


def create_app(
    frontend: Frontend,
    on_start: Callable[[], Any] | None = None,
) -> Starlette:
    """The application over one Frontend; `on_start` runs on the event loop, first."""

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        frontend.client.start()
        if on_start is not None:
            on_start()
        yield
        await frontend.client.close()

    routes = [
        Route("/v1/chat/completions", chat.create, methods=["POST"]),
        Route("/v1/completions", completions.create, methods=["POST"]),
        Route("/v1/models", models.listing),
        Route("/v1/models/{name:path}", models.one),
        Route("/tokenize", tokenize.tokenize, methods=["POST"]),
        Route("/detokenize", tokenize.detokenize, methods=["POST"]),
        Route("/health", health.health),
        Route("/ping", health.health, methods=["GET", "POST"]),
        Route("/ready", health.ready),
        Route("/version", health.version),
        Route("/metrics", health.metrics),
        Route("/", page.page),
        Route("/page/{name}", page.asset),
        Route("/live", page.live),
    ]
    settings = frontend.settings
    middleware = []
    if settings.cors_origin:
        cors: dict[str, Any] = {"allow_methods": ["*"], "allow_headers": ["*"]}
        middleware.append(Middleware(CORSMiddleware, allow_origins=settings.cors_origin, **cors))
    if settings.api_key:
        middleware.append(Middleware(ApiKeys, keys=settings.api_key))
    handlers: dict[Any, Any] = {ApiError: _api_error, HTTPException: _http_error, Exception: _bug}
    app = Starlette(
        routes=routes, middleware=middleware, exception_handlers=handlers, lifespan=lifespan
    )
    app.state.frontend = frontend
    return app
