"""GET /health, /ready, /version and /metrics: for probes and scrapers, open to all."""

from starlette.requests import Request
from starlette.responses import Response

from octavo import __version__
from octavo.server.protocol.errors import unavailable
from octavo.server.protocol.models import Load, Status, Version
from octavo.server.respond import error_response, frontend_of, json_response


async def health(request: Request) -> Response:
    """200 while there is nothing to repair; a start takes its time and is no fault."""
    client = frontend_of(request).client
    trouble = client.trouble()
    if trouble is not None and (client.ready is not None or client.last_words is not None):
        return error_response(unavailable(trouble))
    return json_response(Status("ok" if trouble is None else "starting"))


async def ready(request: Request) -> Response:
    """200 once a request would be answered."""
    trouble = frontend_of(request).client.trouble()
    if trouble is not None:
        return error_response(unavailable(trouble, retry_after=1))
    return json_response(Status("ready"))


async def version(_: Request) -> Response:
    return json_response(Version(__version__))


async def load(request: Request) -> Response:
    """How many generations are under way, for load balancers."""
    return json_response(Load(frontend_of(request).metrics.load()))


async def metrics(request: Request) -> Response:
    text = frontend_of(request).metrics.text()
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")
