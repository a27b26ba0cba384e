"""GET / and /page/{name}: the page and its files. GET /live: what it shows of the engine."""

import hashlib
from functools import cache
from pathlib import Path

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from octavo.server.live import live as live_frames
from octavo.server.respond import frontend_of
from octavo.server.streaming import EventStream

FOLDER = Path(__file__).resolve().parent.parent / "page"
HEADERS = {
    # Nothing but our own files, nothing inline: what a model writes can never become code.
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
TYPES = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}


@cache
def _files() -> dict[str, tuple[bytes, str, str]]:
    """name: (content, media type, entity tag) of every file of the page."""
    found = {}
    for path in (p for p in FOLDER.iterdir() if p.suffix in TYPES):
        content = path.read_bytes()
        tag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
        found[path.name] = (content, TYPES[path.suffix], tag)
    return found


def _file(request: Request, name: str) -> Response:
    if name not in _files():
        raise HTTPException(404)
    content, media_type, tag = _files()[name]
    headers = {**HEADERS, "etag": tag}
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    return Response(content, headers=headers, media_type=media_type)


async def page(request: Request) -> Response:
    return _file(request, "index.html")


async def asset(request: Request) -> Response:
    return _file(request, request.path_params["name"])


async def live(request: Request) -> Response:
    frontend = frontend_of(request)
    frontend.client.views.check_room()
    return EventStream(live_frames(frontend), on_end=lambda: None, request_id="")


# Beside the table of routes: these are for browsers, and no part of what /openapi.json describes.
ROUTES = [Route("/", page), Route("/page/{name}", asset), Route("/live", live)]
