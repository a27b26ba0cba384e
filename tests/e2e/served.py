"""The real command with the real engine in a process of its own."""

import subprocess
import sys
import time
from pathlib import Path

import httpx

from tests.server.conftest import Server, free_port

ROOT = Path(__file__).parent.parent.parent
START = 400.0  # seconds: compiling every program with nothing cached, on two busy cores


def serve(model: str, *flags: str, log: Path) -> Server:
    """`octavo serve MODEL ...` on a free port, ready; what it prints goes to `log`."""
    port = free_port()
    command = [sys.executable, "-m", "octavo", "serve", model, "--port", str(port), *flags]
    with log.open("w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, text=True, cwd=ROOT
        )
    server = Server(f"http://127.0.0.1:{port}", process)
    end = time.monotonic() + START
    while not _ready(server):
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.1)
    return server


def _ready(server: Server) -> bool:
    try:
        return server.get("/ready").status_code == 200
    except httpx.TransportError:
        return False


def end(server: Server) -> int:
    """SIGTERM; the exit code."""
    if server.process.poll() is None:
        server.process.terminate()
    try:
        return server.process.wait(60)
    finally:
        server.process.kill()


def pages_in_use(server: Server) -> float:
    """Pages that are neither free nor kept for their prefix."""
    lines = server.get("/metrics").text.splitlines()
    [used] = [line for line in lines if line.startswith("octavo:pages{") and 'state="used"' in line]
    return float(used.split()[-1])
