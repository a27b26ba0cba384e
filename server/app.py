"""The Starlette application: which route is whose, who may ask, and how an error becomes a body."""

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response

from octavo.server.frontend import Frontend
from octavo.server.keys import ApiKeys, needs_key
from octavo.server.observe import Observed, log_line
from octavo.server.openapi import document, page
from octavo.server.protocol.errors import ApiError
from octavo.server.respond import error_response
from octavo.server.routes.table import ENDPOINTS

logger = logging.getLogger("octavo.server")


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


async def _too_deep(_: Request, error: Exception) -> Response:
    """A body may be read and still be too deep for what works on it: templates, schemas."""
    logger.warning("a request was nested too deeply", exc_info=error)
    return error_response(ApiError(400, "the body is nested too deeply"))


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
        frontend.siblings.start()
        if on_start is not None:
            on_start()
        yield
        frontend.siblings.stop()
        frontend.template_room.close()
        await frontend.client.close()
        frontend.grammars.close()

    routes = [endpoint.route() for endpoint in ENDPOINTS]
    settings = frontend.settings
    tell = [log_line()] if settings.enable_log_requests else []
    middleware = [Middleware(Observed, figures=frontend.client.figures, tell=tell)]
    if settings.cors_origin:
        cors: dict[str, Any] = {"allow_methods": ["*"], "allow_headers": ["*"]}
        middleware.append(Middleware(CORSMiddleware, allow_origins=settings.cors_origin, **cors))
    if settings.api_key:
        middleware.append(Middleware(ApiKeys, settings=settings))
    handlers: dict[Any, Any] = {
        ApiError: _api_error,
        HTTPException: _http_error,
        RecursionError: _too_deep,
        Exception: _bug,
    }
    app = Starlette(
        routes=routes, middleware=middleware, exception_handlers=handlers, lifespan=lifespan
    )
    app.state.frontend = frontend
    described = document(ENDPOINTS, lambda path: needs_key(settings, path))
    app.state.openapi, app.state.docs = msgspec.json.encode(described), page(described)
    return app
