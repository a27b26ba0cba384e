"""/v1/responses: ask, ask again later, cancel, forget."""

from starlette.requests import Request
from starlette.responses import Response

from octavo.server.frontend import RequestId
from octavo.server.protocol.errors import bad_request
from octavo.server.protocol.responses import Deleted, ResponsesRequest
from octavo.server.respond import json_response, read_body
from octavo.server.responding import Responses
from octavo.server.streaming import EventStream, while_connected

MAX_LIMIT = 100


def _responses(request: Request) -> Responses:
    responses: Responses = request.app.state.responses
    return responses


async def create(request: Request) -> Response:
    responses = _responses(request)
    body = await read_body(request, ResponsesRequest)
    name = RequestId.fresh(body, "resp_")
    job = await responses.begin(body, name)
    if body.background:
        await responses.detach(job, streams=bool(body.stream))
        if body.stream:
            return EventStream(responses.follow(name.public, -1), _nothing, name.public, b"")
        return json_response(job.response, request_id=name.public)
    if body.stream:
        return EventStream(responses.stream(job), job.turn.cancel, name.public, b"")
    try:
        response = await while_connected(request, responses.whole(job))
    finally:
        job.turn.cancel()
    return json_response(response, request_id=name.public)


async def retrieve(request: Request) -> Response:
    responses, name = _responses(request), request.path_params["response_id"]
    stored = await responses.find(name)
    if request.query_params.get("stream") != "true":
        return json_response(stored.response)
    if not stored.streams:
        raise bad_request(
            f"the response `{name}` was not asked for with `background` and `stream`", "stream"
        )
    after = _number(request, "starting_after", -1, -1, 2**53)
    return EventStream(responses.follow(name, after), _nothing, name, b"")


async def delete(request: Request) -> Response:
    name = request.path_params["response_id"]
    await _responses(request).delete(name)
    return json_response(Deleted(name))


async def cancel(request: Request) -> Response:
    return json_response(await _responses(request).cancel(request.path_params["response_id"]))


async def input_items(request: Request) -> Response:
    limit = _number(request, "limit", 20, 1, MAX_LIMIT)
    order = request.query_params.get("order", "desc")
    if order not in ("asc", "desc"):
        raise bad_request(f"`order` must be `asc` or `desc`, got {order!r}", "order")
    name, after = request.path_params["response_id"], request.query_params.get("after")
    items = await _responses(request).input_items(name, limit, order == "desc", after)
    return json_response(items)


def _number(request: Request, name: str, default: int, low: int, high: int) -> int:
    text = request.query_params.get(name)
    try:
        value = default if text is None else int(text)
    except ValueError:
        raise bad_request(f"`{name}` must be a number, got {text!r}", name) from None
    if not low <= value <= high:
        raise bad_request(f"`{name}` must be from {low} to {high}, got {value}", name)
    return value


def _nothing() -> None:
    """The work goes on without its reader."""
