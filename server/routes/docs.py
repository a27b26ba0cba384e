"""GET /openapi.json and /docs: what this server takes and gives."""

from starlette.requests import Request
from starlette.responses import Response

from octavo.server.respond import JSON

POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; frame-ancestors 'none'"


async def openapi(request: Request) -> Response:
    return Response(request.app.state.openapi, media_type=JSON)


async def page(request: Request) -> Response:
    headers = {"content-security-policy": POLICY}
    return Response(request.app.state.docs, headers=headers, media_type="text/html")
