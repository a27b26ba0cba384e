"""The door, in front of fake replicas that answer, end in the middle, or are not there."""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

import httpx
import openai
import pytest

from octavo.server.protocol.errors import unavailable
from octavo.server.replicas.door import LOST, Door, ReplicaLost
from octavo.server.replicas.exchange import Answer, Head, Order

JSON = [(b"content-type", b"application/json")]
EVENTS = [(b"content-type", b"text/event-stream; charset=utf-8")]
URL = "http://door"


class FakeReplicas:
    """Each request takes the next script; a script is the pieces of one answer.

    ReplicaLost or another exception in a script is raised there; None waits for the end of time.
    """

    def __init__(self, *scripts: Sequence[object]) -> None:
        self.scripts = [*scripts]
        self.asked: list[Order] = []
        self.closed = 0
        self.told: list[Answer] = []

    async def ask(self, order: Order) -> AsyncIterator[Head | bytes]:
        self.asked.append(order)
        try:
            for piece in self.scripts.pop(0):
                if isinstance(piece, Exception):
                    raise piece
                if piece is None:
                    await asyncio.sleep(3600)
                yield piece  # type: ignore[misc]
        finally:
            self.closed += 1

    async def ask_all(self, order: Order) -> list[Answer]:
        self.asked.append(order)
        return self.told

    def door(self, retries: int = 2, max_body_bytes: int = 1000) -> Door:
        return Door(self.ask, self.ask_all, retries=retries, max_body_bytes=max_body_bytes)

    def client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(transport=httpx.ASGITransport(self.door()), base_url=URL)


def whole(text: str, status: int = 200) -> list[object]:
    return [Head(status, JSON), text.encode()]


async def test_an_answer_comes_as_the_replica_gave_it_and_the_replica_sees_the_request():
    replicas = FakeReplicas([Head(404, [*JSON, (b"x-own", b"1")]), b'{"a"', b": 1}"])
    async with replicas.client() as client:
        got = await client.post("/v1/completions?q=2", json={"x": 1}, headers={"x-api-key": "k"})
    assert (got.status_code, got.json(), got.headers["x-own"]) == (404, {"a": 1}, "1")
    order = replicas.asked[0]
    assert (order.method, order.path, order.query) == ("POST", "/v1/completions", b"q=2")
    assert json.loads(order.body) == {"x": 1}
    assert (b"x-api-key", b"k") in order.headers


@pytest.mark.parametrize(
    "first",
    [
        [ReplicaLost("gone")],
        [Head(200, JSON), ReplicaLost("gone")],
        [Head(200, JSON), b'{"half', ReplicaLost("gone")],
        [],
    ],
    ids=["before it answers", "after its head", "in the middle of its body", "without a word"],
)
async def test_an_answer_that_is_no_stream_is_asked_for_again_when_its_replica_ends(first):
    replicas = FakeReplicas(first, whole('"good"'))
    async with replicas.client() as client:
        got = await client.post("/v1/completions", content=b"body")
    assert (got.status_code, got.json()) == (200, "good")
    assert [order.body for order in replicas.asked] == [b"body", b"body"]


async def test_a_request_that_ends_one_replica_after_another_is_given_up():
    replicas = FakeReplicas(*[[ReplicaLost("gone")] for _ in range(5)])
    async with replicas.client() as client:
        got = await client.post("/v1/completions")
    assert (got.status_code, len(replicas.asked)) == (503, 3)
    assert "3 replicas ended" in got.json()["error"]["message"]
    assert got.headers["retry-after"] == "1"


async def test_a_stream_whose_replica_ends_before_its_head_is_asked_for_again():
    replicas = FakeReplicas([ReplicaLost("gone")], [Head(200, EVENTS), b"data: 1\n\n"])
    async with replicas.client() as client:
        got = await client.post("/v1/completions")
    assert got.text == "data: 1\n\n"


async def test_a_stream_that_had_begun_ends_with_an_error_event_and_is_not_asked_for_again():
    replicas = FakeReplicas([Head(200, EVENTS), b'data: {"n": 1}\n\n', ReplicaLost("gone")])
    async with replicas.client() as client:
        got = await client.post("/v1/chat/completions")
    first, error, done = got.text.strip().split("\n\n")
    assert (first, done) == ('data: {"n": 1}', "data: [DONE]")
    told = json.loads(error.removeprefix("data: "))["error"]
    assert (told["message"], told["code"]) == (LOST, 500)
    assert len(replicas.asked) == 1


async def test_the_error_event_is_one_that_clients_of_each_api_know():
    chunk = b'data: {"id":"1","object":"text_completion","created":1,"model":"m","choices":[]}\n\n'
    started = b'event: message_stop\ndata: {"type": "message_stop"}\n\n'
    created = b'event: response.created\ndata: {"type":"response.created","sequence_number":6}\n\n'
    scripts = [[Head(200, EVENTS), c, ReplicaLost("gone")] for c in (chunk, started, created)]
    replicas = FakeReplicas(*scripts)
    async with replicas.client() as http:
        ours: Any = http  # some versions of openai want another package's client by its type
        mine = openai.AsyncOpenAI(base_url=f"{URL}/v1", api_key="k", http_client=ours)
        with pytest.raises(openai.APIError, match="the replica that worked"):
            async for _ in await mine.completions.create(model="m", prompt="a", stream=True):
                pass
        theirs = (await http.post("/v1/messages")).text.strip().split("\n\n")[-1]
        events = [e async for e in await mine.responses.create(model="m", input="a", stream=True)]
    name, _, data = theirs.partition("\n")
    told = json.loads(data.removeprefix("data: "))
    assert (name, told["type"]) == ("event: error", "error")
    assert told["error"] == {"type": "api_error", "message": LOST}
    assert (events[-1].type, events[-1].message) == ("error", LOST)
    assert events[-1].sequence_number == 7


async def test_a_client_that_leaves_takes_the_work_along():
    replicas = FakeReplicas([Head(200, EVENTS), b"data: 1\n\n", None])
    messages = [{"type": "http.request", "body": b"", "more_body": False}]
    sent: list[dict] = []
    leave = asyncio.Event()

    async def receive():
        if messages:
            return messages.pop()
        await leave.wait()
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)
        if message.get("body"):
            leave.set()

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
    await asyncio.wait_for(replicas.door()(scope, receive, send), 5)
    assert replicas.closed == 1, "the replica was told"
    assert sent[-1]["body"] == b"data: 1\n\n"


async def test_a_body_that_is_too_large_and_a_door_without_replicas_are_refused():
    replicas = FakeReplicas([unavailable("no replica could be started")])
    async with replicas.client() as client:
        large = await client.post("/v1/completions", content=b"x" * 1001)
        none = await client.post("/v1/messages", content=b"x")
        metrics = await client.get("/metrics")
    assert (large.status_code, "1000 bytes" in large.json()["error"]["message"]) == (413, True)
    assert none.status_code == 529, "as Anthropic's clients know it"
    assert (metrics.status_code, len(replicas.asked)) == (503, 2)


async def test_what_nobody_foresaw_is_an_error_in_the_shape_of_the_api(caplog):
    begun = [Head(200, EVENTS), b"data: 1\n\n", RuntimeError("a secret")]
    replicas = FakeReplicas([RuntimeError("a secret")], begun)
    async with replicas.client() as client:
        whole = await client.post("/v1/completions")
        stream = await client.post("/v1/completions")
    assert (whole.status_code, whole.json()["error"]["code"]) == (500, 500)
    assert stream.text.startswith("data: 1\n\n") and stream.text.endswith("data: [DONE]\n\n")
    assert "internal error" in whole.text and "internal error" in stream.text
    assert "a secret" in caplog.text and "a secret" not in whole.text + stream.text


async def test_metrics_are_those_of_all_replicas_and_the_load_is_their_sum():
    text = (
        "# HELP vllm:num_requests_running Sequences\n# TYPE vllm:num_requests_running gauge\n"
        'vllm:num_requests_running{engine="0"} %d\n'
        "# HELP a_total A\n# TYPE a_total counter\na_total 3\n"
        "# HELP h H\n# TYPE h histogram\n"
        'h_bucket{le="1.0"} 2\nh_bucket{le="+Inf"} 3\nh_sum 4\nh_count 3\n'
    )
    replicas = FakeReplicas()
    good = Head(200, [])
    async with replicas.client() as client:
        replicas.told = [Answer(good, (text % n).encode(), f"r{n}") for n in (1, 2)]
        lines = (await client.get("/metrics")).text.splitlines()
        replicas.told = [Answer(good, b'{"server_load": %d}' % n, "") for n in (3, 4)]
        load = (await client.get("/load")).json()
        replicas.told[1] = Answer(Head(401, JSON), b'{"error": 1}', "")
        refused = await client.get("/load")
    for line in (
        'vllm:num_requests_running{engine="0",replica="r1"} 1.0',
        'vllm:num_requests_running{engine="0",replica="r2"} 2.0',
        'a_total{replica="r1"} 3.0',
        'h_bucket{le="+Inf",replica="r2"} 3.0',
        'h_count{replica="r2"} 3.0',
    ):
        assert line in lines, line
    assert sum(line == "# TYPE a_total counter" for line in lines) == 1
    assert load == {"server_load": 7}
    assert (refused.status_code, refused.json()) == (401, {"error": 1}), "keys hold here too"
