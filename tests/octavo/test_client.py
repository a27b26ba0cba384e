"""The small HTTP client, against a fake endpoint that speaks over a real socket."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from octavo.cli.client import Endpoint, HttpError
from octavo.cli.run_batch import answer_all
from octavo.engine.config import ConfigError

pytestmark = pytest.mark.smoke

MODELS = {"data": [{"id": "fake-model"}]}


def response(status: int, body: Any) -> bytes:
    payload = json.dumps(body).encode()
    head = f"HTTP/1.1 {status} X\r\nContent-Length: {len(payload)}\r\n\r\n"
    return head.encode() + payload


def chunked(*pieces: bytes) -> bytes:
    """Pieces as HTTP chunks; a piece may end in the middle of a line."""
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    return head + b"".join(b"%x\r\n%s\r\n" % (len(p), p) for p in (*pieces, b""))


@asynccontextmanager
async def fake_server(answers: dict[str, bytes]) -> AsyncIterator[tuple[Endpoint, list[str]]]:
    """A server with one canned response per path, and the requests it saw."""
    seen: list[str] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = int(head.lower().split("content-length:")[1].split()[0])
        seen.append(head + (await reader.readexactly(length)).decode())
        writer.write(answers[head.split()[1]])
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server:
        yield Endpoint("127.0.0.1", port, key="secret"), seen


async def test_an_endpoint_lists_its_first_model_and_gets_the_key() -> None:
    async with fake_server({"/v1/models": response(200, MODELS)}) as (endpoint, seen):
        assert await endpoint.first_model() == "fake-model"
    assert "Authorization: Bearer secret" in seen[0]


async def test_events_are_whole_whatever_the_chunks_are() -> None:
    stream = chunked(b'data: {"a": 1}\n\nda', b'ta: {"a": 2}\n', b"\n: note\n\ndata: [DONE]\n\n")
    async with fake_server({"/v1/x": stream}) as (endpoint, _):
        assert [event async for event in endpoint.events("/v1/x", {})] == [{"a": 1}, {"a": 2}]


async def test_a_refusal_carries_the_servers_sentence() -> None:
    refusal = response(400, {"error": {"message": "`max_tokens` must be at least 1, got 0"}})
    async with fake_server({"/v1/x": refusal}) as (endpoint, _):
        with pytest.raises(HttpError, match="HTTP 400: `max_tokens` must be at least 1, got 0"):
            await endpoint.fetch("POST", "/v1/x", {})


async def test_an_error_in_mid_stream_is_raised() -> None:
    stream = chunked(b'data: {"error": {"message": "out of order"}}\n\n')
    async with fake_server({"/v1/x": stream}) as (endpoint, _):
        with pytest.raises(HttpError, match="out of order"):
            [event async for event in endpoint.events("/v1/x", {})]


async def test_a_server_that_is_not_there_is_named_with_a_hint() -> None:
    with pytest.raises(ConfigError, match="cannot reach http://127.0.0.1:1: ") as caught:
        await Endpoint("127.0.0.1", 1).first_model()
    assert "octavo serve" in caught.value.hint


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://localhost:8000", "http://localhost:8000"),
        ("localhost:8000/v1/", "http://localhost:8000"),
        ("https://example.org/llm/v1", "https://example.org:443/llm"),
    ],
)
def test_an_address_may_end_in_v1(url: str, shown: str) -> None:
    assert str(Endpoint.parse(url)) == shown


async def test_a_batch_keeps_its_order_and_survives_a_refusal() -> None:
    answers = {
        "/v1/models": response(200, MODELS),
        "/v1/completions": response(200, {"id": "cmpl-1", "choices": []}),
        "/v1/chat/completions": response(400, {"error": {"message": "no messages"}}),
    }
    requests = [
        {"custom_id": "a", "url": "/v1/completions", "body": {"prompt": "x", "stream": True}},
        {"custom_id": "b", "url": "/v1/chat/completions", "body": {}},
    ]
    async with fake_server(answers) as (endpoint, seen):
        found = await asyncio.to_thread(answer_all, endpoint, requests, 2)
    assert [answer["custom_id"] for answer in found] == ["a", "b"]
    assert found[0]["response"]["body"]["id"] == "cmpl-1"
    assert found[1]["error"] == {"code": "400", "message": "HTTP 400: no messages"}
    assert any('"stream": false' in request and "fake-model" in request for request in seen)
