"""A running server: the real command, the real sockets, and an engine that repeats the prompt."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from openai import OpenAI

from tests.server.tiny_model import write_tiny_model

HERE = Path(__file__).parent
PATIENCE = 30.0  # seconds


@dataclass
class Server:
    url: str
    process: "subprocess.Popen[str]"

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=PATIENCE)

    def post(self, path: str, body: object) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=PATIENCE)

    def openai(self, key: str = "none") -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=PATIENCE)

    def metric(self, name: str) -> float:
        """The sum of a metric's samples whose line begins with `name`."""
        lines = self.get("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))

    def until(self, holds: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + PATIENCE
        while not holds():
            assert time.monotonic() < end, what
            time.sleep(0.02)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(model: Path, *flags: str, step: float = 0.0, wait: bool = True) -> Server:
    port = free_port()
    command = [sys.executable, str(HERE / "serve_with_fake_engine.py"), str(model)]
    command += ["--load-format", "dummy", "--served-model-name", "tiny", "--port", str(port)]
    process = subprocess.Popen(
        [*command, *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={
            **os.environ,
            "FAKE_STEP_SECONDS": str(step),
            "PYTHONPATH": f"{HERE.parent.parent}{os.pathsep}{HERE}",
        },
    )
    server = Server(f"http://127.0.0.1:{port}", process)
    if wait:
        server.until(lambda: _is_ready(server), "the server is not ready")
    return server


def _is_ready(server: Server) -> bool:
    assert server.process.poll() is None, server.process.communicate()
    try:
        return server.get("/ready").status_code == 200
    except httpx.TransportError:
        return False


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def server(model: Path) -> Iterator[Server]:
    """One server for all tests that leave it as it was."""
    running = start(model, step=0.001)
    yield running
    running.process.terminate()
    running.process.wait(PATIENCE)


@pytest.fixture
def launch(model: Path) -> Iterator[Callable[..., Server]]:
    """Starts servers for one test."""
    started: list[Server] = []

    def launcher(*flags: str, step: float = 0.0, wait: bool = True) -> Server:
        started.append(start(model, *flags, step=step, wait=wait))
        return started[-1]

    yield launcher
    for one in started:
        one.process.kill()
        one.process.wait()
