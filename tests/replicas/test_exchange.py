"""A request as data: what an application sees of it, and how its answer comes back."""

import asyncio

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from octavo.server.replicas.exchange import ROOM, Head, Order, answer, whole

ORDER = Order("POST", "/echo", b"a=1", [(b"x-own", b"2")], b"body")


async def echo(request: Request) -> JSONResponse:
    body = (await request.body()).decode()
    seen = [request.method, request.url.path, request.query_params["a"], request.headers["x-own"]]
    return JSONResponse([*seen, body], status_code=201)


def app(handler) -> Starlette:
    return Starlette(routes=[Route("/echo", handler, methods=["POST"])])


async def test_the_application_sees_the_request_as_it_was():
    got = await whole(app(echo), ORDER, "r1")
    assert (got.head.status, got.replica) == (201, "r1")
    assert got.body == b'["POST","/echo","1","2","body"]'
    assert not got.head.streams


async def test_a_reader_that_leaves_ends_the_work():
    ended = asyncio.Event()

    async def forever(_: Request) -> StreamingResponse:
        async def ticks():
            try:
                while True:
                    yield b"data: 1\n\n"
                    await asyncio.sleep(0.001)
            finally:
                ended.set()

        return StreamingResponse(ticks(), media_type="text/event-stream")

    pieces = answer(app(forever), ORDER)
    head = await anext(pieces)
    assert isinstance(head, Head) and head.streams
    assert await anext(pieces) == b"data: 1\n\n"
    await pieces.aclose()  # type: ignore[attr-defined]
    await asyncio.wait_for(ended.wait(), 5)


async def test_what_piles_up_is_joined_and_a_slow_reader_makes_the_application_wait():
    made = 0

    async def raw(scope, receive, send):
        nonlocal made
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for i in range(4 * ROOM):
            chunk = b"%03d " % i
            if i % 2 or not scope["octavo.write"](chunk):
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            made += 1
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    pieces = answer(raw, ORDER)
    await anext(pieces)
    await asyncio.sleep(0.05)
    assert made <= ROOM
    rest = [piece async for piece in pieces if isinstance(piece, bytes)]
    assert b"".join(rest).split() == [b"%03d" % i for i in range(4 * ROOM)]
    assert len(rest) <= 8, "a piece is what had piled up"


async def test_an_application_that_breaks_ends_the_answer(caplog):
    async def broken(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise RuntimeError("it broke")

    assert [type(piece) async for piece in answer(broken, ORDER)] == [Head]
    assert "it broke" in caplog.text


@pytest.mark.parametrize("kind, streams", [(b"text/event-stream", True), (b"text/plain", False)])
def test_a_stream_is_known_by_its_type(kind, streams):
    assert Head(200, [(b"Content-Type", kind)]).streams is streams
