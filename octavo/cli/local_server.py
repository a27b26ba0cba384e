"""A private server for the length of a `with` block, for commands that ask a model over HTTP."""

import asyncio
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from octavo.cli.client import Endpoint, HttpError
from octavo.engine.config import ConfigError, EngineConfig, flag

STOP_SECONDS = 30.0  # a server that drains is given this long before it is killed


def config_flags(config: EngineConfig) -> list[str]:
    """The command line that gives this config again."""
    flags = []
    for name, value in config.overrides().items():
        if isinstance(value, bool):
            flags.append(flag(name) if value else "--no-" + flag(name)[2:])
        else:
            flags.append(f"{flag(name)}={value}")
    return flags


@contextmanager
def local_server(config: EngineConfig, extra: tuple[str, ...] = ()) -> Iterator[Endpoint]:
    """`octavo serve` on a free port of this machine, ready; stopped when the block ends."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = ("--host", "127.0.0.1", "--port", str(port))
    command = [sys.executable, "-m", "octavo", "serve", *config_flags(config), *address, *extra]
    child = subprocess.Popen(command, stdout=sys.stderr)
    try:
        endpoint = Endpoint("127.0.0.1", port)
        asyncio.run(_until_ready(endpoint, child))
        yield endpoint
    finally:
        child.terminate()
        try:
            child.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


async def _until_ready(endpoint: Endpoint, child: "subprocess.Popen[bytes]") -> None:
    started = time.monotonic()
    while child.poll() is None:
        try:
            await endpoint.text("GET", "/ready")
            return
        except (ConfigError, HttpError, ConnectionError):
            await asyncio.sleep(0.2)
    seconds = time.monotonic() - started
    raise ConfigError(
        f"the server ended with exit code {child.returncode} after {seconds:.0f} s",
        "its own words are above",
    )
