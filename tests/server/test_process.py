"""The engine process over its real sockets, with an engine that only repeats the prompt."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import zmq

from octavo.engine.config import EngineConfig
from octavo.engine.messages import (
    Abort,
    AddRequest,
    Dead,
    EncodeRequest,
    Finish,
    FromEngine,
    Output,
    Ready,
    Stats,
)
from octavo.engine.process import client_identity, outputs_endpoint, requests_endpoint
from octavo.engine.sampling_params import SamplingParams
from octavo.server.launch import EngineProcess

PATIENCE = 20.0  # seconds: two slow cores may start a process in five


class RawClient:
    """The other end of the sockets, as bare as it can be."""

    def __init__(self, address: str, number: int) -> None:
        self.context = zmq.Context()
        self.requests = self._socket(requests_endpoint(address), number)
        self.outputs = self._socket(outputs_endpoint(address), number)
        self.outputs.send(b"")

    def _socket(self, endpoint: str, number: int) -> Any:
        socket = self.context.socket(zmq.DEALER)
        socket.setsockopt(zmq.IDENTITY, client_identity(number))
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(endpoint)
        return socket

    def send(self, message: Any) -> None:
        self.requests.send(msgspec.msgpack.encode(message))

    def ask(self, handle: int, prompt: list[int], salt: str = "", **sampling: Any) -> None:
        tokens = np.array(prompt, "<i4").tobytes()
        params = SamplingParams(**sampling)
        self.send(AddRequest(handle, str(handle), tokens, params, cache_salt=salt))

    def hear(self, patience: float = PATIENCE) -> Any:
        assert self.outputs.poll(patience * 1000), "the engine said nothing"
        return msgspec.msgpack.decode(self.outputs.recv(), type=FromEngine)

    def tokens(self, count: int) -> list[tuple[int, int]]:
        """(handle, token) pairs until `count` sequences have finished."""
        pairs: list[tuple[int, int]] = []
        while count:
            message = self.hear()
            if isinstance(message, Output):
                handles = np.frombuffer(message.handles, "<u4").tolist()
                pairs += zip(handles, np.frombuffer(message.tokens, "<i4").tolist(), strict=True)
                count -= len(message.finished)
        return pairs

    def close(self) -> None:
        self.requests.close()
        self.outputs.close()
        self.context.term()


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[EngineProcess]:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.setenv("FAKE_STEP_SECONDS", "0.002")
    process = EngineProcess(EngineConfig(), core="fake_engine:FakeCore")
    yield process
    process.stop(5.0)


@pytest.fixture
def client(engine: EngineProcess) -> Iterator[RawClient]:
    raw = RawClient(engine.address, 0)
    assert isinstance(raw.hear(), Ready)
    yield raw
    raw.close()


def test_the_first_word_is_ready_and_a_heartbeat_follows_when_idle(client: RawClient) -> None:
    beats = [client.hear(2.0) for _ in range(3)]
    assert all(isinstance(beat.stats, Stats) for beat in beats)


def test_every_client_gets_its_own_tokens_under_its_own_handles(
    engine: EngineProcess, client: RawClient
) -> None:
    other = RawClient(engine.address, 1)
    assert isinstance(other.hear(), Ready)
    client.ask(5, [10, 11], max_tokens=4)
    other.ask(5, [20, 21], max_tokens=3, n=2)
    assert client.tokens(1) == [(5, 10), (5, 11), (5, 10), (5, 11)]
    assert sorted(other.tokens(2)) == sorted([(5, 20), (5, 21), (5, 20), (6, 20), (6, 21), (6, 20)])
    other.close()


def test_an_engine_that_generates_refuses_texts_to_read(client: RawClient) -> None:
    client.send(EncodeRequest(9, "9", np.array([7], "<i4").tobytes()))
    while not (finished := client.hear().finished):
        pass
    assert [(f.handle, f.reason, f.status) for f in finished] == [(9, "error", 400)]
    client.ask(5, [10], max_tokens=2)
    assert client.tokens(1) == [(5, 10), (5, 10)]


def test_an_aborted_sequence_is_heard_of_no_more(client: RawClient) -> None:
    client.ask(1, [7], max_tokens=400)
    while not client.hear().handles:
        pass
    client.send(Abort([1]))
    until = time.monotonic() + PATIENCE
    while client.hear().stats is None or client.hear().handles:
        assert time.monotonic() < until, "it goes on"


def test_the_work_of_a_client_that_left_is_aborted(
    engine: EngineProcess, client: RawClient
) -> None:
    other = RawClient(engine.address, 1)
    assert isinstance(other.hear(), Ready)
    other.ask(1, [7], max_tokens=100_000)
    other.ask(2, [7], max_tokens=100_000)
    while not other.hear().handles:
        pass
    other.close()
    began = time.monotonic()
    while (stats := client.hear().stats) is None or stats.running:
        # Half of what the two would take: only an abort ends them sooner.
        assert time.monotonic() - began < 1.0 + 0.002 * 400, "nobody told the engine"


def test_sigterm_lets_the_accepted_finish_and_refuses_the_new(
    engine: EngineProcess, client: RawClient
) -> None:
    client.ask(1, [7], max_tokens=300)
    while not client.hear().handles:
        pass
    os.kill(engine.pid, signal.SIGTERM)
    time.sleep(0.05)
    client.ask(2, [8], max_tokens=3)
    finishes: dict[int, Finish] = {}
    while 1 not in finishes:
        finishes |= {finish.handle: finish for finish in client.hear().finished}
    assert finishes[1].reason == "length"
    assert (finishes[2].reason, finishes[2].status) == ("error", 503)
    assert engine.stop(10.0) == 0


def test_the_last_words_reach_the_clients(engine: EngineProcess, client: RawClient) -> None:
    client.ask(1, [7], salt="die")
    while not isinstance(message := client.hear(), Dead):
        pass
    assert message.message == "RuntimeError: the device fell off the bus"
    assert engine.stop(10.0) == 1


def test_a_setting_that_cannot_work_is_told_with_its_hint(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    process = EngineProcess(EngineConfig(num_pages=3), core="fake_engine:FakeCore")
    raw = RawClient(process.address, 0)
    message = raw.hear()
    assert isinstance(message, Dead)
    assert message.message == "the cache does not fit\nhint: --num-pages 0 takes what memory allows"
    assert process.stop(10.0) == 2
    raw.close()


def test_the_engine_ends_with_its_parent(engine: EngineProcess, client: RawClient) -> None:
    stdin = engine._process.stdin
    assert stdin is not None
    stdin.close()  # what the kernel does for a parent that dies
    assert engine._process.wait(PATIENCE) == 1
    assert not Path(engine.folder).exists()
