"""Replicas with real engine processes, a fake engine in each, behind a real door."""

import asyncio
import json
import os
import signal
from pathlib import Path

import httpx
import pytest

from octavo.engine.config import ConfigError, EngineConfig
from octavo.server.replicas.door import Door, ReplicaLost
from octavo.server.replicas.exchange import Order
from octavo.server.replicas.replica import Replica
from octavo.server.settings import ServerSettings
from tests.server.tiny_model import write_tiny_model

ROOT = Path(__file__).resolve().parents[2]
CORE = "tests.server.fake_engine:FakeCore"
ASK = {"prompt": "abcd", "max_tokens": 4}


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Makes replicas, and what they did at their engine's end."""
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setenv("FAKE_STEP_SECONDS", "0.005")
    folder = write_tiny_model(tmp_path)

    def one(name: str, ends: list[str], **settings) -> Replica:
        config = EngineConfig(model=str(folder), load_format="dummy", **settings)
        server = ServerSettings(served_model_name=["tiny"], api_key=["secret"])
        return Replica(config, server, name, on_end=lambda: ends.append(name), core=CORE)

    return one


def order(body: dict, path: str = "/v1/completions") -> Order:
    return Order("POST", path, b"", [(b"x-api-key", b"secret")], json.dumps(body).encode())


async def test_a_replica_answers_and_its_end_is_its_engines_end(make):
    ends: list[str] = []
    replica = make("one", ends)
    await replica.start()
    try:
        assert replica.trouble() is None
        head, *body = [piece async for piece in replica.answer(order(ASK))]
        assert json.loads(b"".join(body))["choices"][0]["text"] == "abcd"
        told = await replica.tell(Order("GET", "/load", b"", [(b"x-api-key", b"secret")], b""))
        assert (told.replica, json.loads(told.body)) == ("one", {"server_load": 0})
        told = await replica.tell(Order("GET", "/version", b"", [], b""))
        assert told.head.status == 401, "keys are asked for by the replica"

        stream = replica.answer(order({**ASK, "max_tokens": 400, "stream": True}))
        await anext(stream)
        os.kill(replica._engine.pid, signal.SIGKILL)
        rest = b"".join([piece async for piece in stream])
        assert b"SIGKILL" in rest and rest.endswith(b"data: [DONE]\n\n")
        with pytest.raises(ReplicaLost, match="SIGKILL"):
            await anext(replica.answer(order(ASK)))
        for _ in range(50):
            await asyncio.sleep(0.1)
            if ends:
                break
        assert ends == ["one"]
    finally:
        await replica.stop()


async def test_an_engine_that_cannot_start_is_a_replica_that_cannot(make):
    replica = make("none", [], num_pages=3)  # which this fake refuses
    with pytest.raises(ConfigError, match="the cache does not fit"):
        await replica.start()


async def test_a_request_outlives_the_engine_that_had_it_and_the_client_never_knows(make):
    replicas = [make("one", []), make("two", [])]
    await asyncio.gather(*(replica.start() for replica in replicas))
    chosen: list[str] = []

    async def ask(given: Order):
        replica = replicas[min(len(chosen), 1)]  # the first time the first one
        chosen.append(replica.name)
        async for piece in replica.answer(given):
            yield piece

    async def ask_all(given: Order):
        return [await replica.tell(given) for replica in replicas]

    door = Door(ask, ask_all, retries=2, max_body_bytes=10**6)
    transport = httpx.ASGITransport(door)
    headers = {"x-api-key": "secret"}
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://d") as client:
            body = {**ASK, "max_tokens": 200}
            asked = asyncio.create_task(
                client.post("/v1/completions", json=body, headers=headers, timeout=20)
            )
            while not chosen or not replicas[0].client.open_requests:
                await asyncio.sleep(0.01)
            os.kill(replicas[0]._engine.pid, signal.SIGKILL)
            got = await asked
            metrics = await client.get("/metrics", headers=headers)
        assert (got.status_code, chosen) == (200, ["one", "two"])
        assert got.json()["usage"]["completion_tokens"] == 200
        assert 'octavo:slots{engine="0",model_name="tiny",replica="two"} 4096.0' in metrics.text
    finally:
        await asyncio.gather(*(replica.stop() for replica in replicas))
