"""Bodies in, bodies out: the two ends of every handler."""

import json
from typing import TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from octavo.server.frontend import Frontend
from octavo.server.protocol.errors import ApiError, bad_request, from_validation

Body = TypeVar("Body")
JSON = "application/json"


def frontend_of(request: Request) -> Frontend:
    frontend: Frontend = request.app.state.frontend
    return frontend


async def read_body(request: Request, kind: type[Body]) -> Body:
    """The request's body as a `kind`; ApiError 400 names the field that does not fit."""
    limit = frontend_of(request).settings.max_body_bytes
    announced = request.headers.get("content-length", "0")
    if announced.isdecimal() and int(announced) > limit:
        raise ApiError(413, f"the body has {announced} bytes, more than the limit of {limit}")
    raw = bytearray()
    try:
        async for piece in request.stream():
            raw += piece
            if len(raw) > limit:
                raise ApiError(413, f"the body has more than the limit of {limit} bytes")
    except ClientDisconnect:
        raise ApiError(499, "the client left before its body was whole") from None
    try:
        return msgspec.json.decode(raw, type=kind)
    except msgspec.ValidationError as error:
        raise from_validation(error) from None
    except RecursionError:
        raise bad_request("the body is nested too deeply") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise bad_request(f"the body is not JSON: {_where(bytes(raw), error)}") from None


def _where(raw: bytes, error: Exception) -> str:
    try:
        json.loads(raw)
    except ValueError as found:  # this decoder tells line and column
        return str(found)
    except RecursionError:
        pass
    return str(error)


def json_response(body: object, status: int = 200, request_id: str = "") -> Response:
    headers = {"x-request-id": request_id} if request_id else None
    return Response(msgspec.json.encode(body), status, headers, media_type=JSON)


def error_response(error: ApiError) -> Response:
    response = json_response(error.body(), error.status)
    response.headers.update(error.headers)
    return response
