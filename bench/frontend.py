"""What the HTTP side alone can do: the real server, in front of an engine that answers at once.

  merged   the engine is faster than the server: tokens that pile up share a chunk
  single   the engine paces its steps: one token a chunk
  open     many streams at once, and what each of them costs in memory

The load comes from this process, on the same cores. Processor time is user and system time of the
API process, the engine's process and the load generator over all tokens.

example:
  octavo bench frontend smollm2-135m --streams 256 --output-len 512
"""

import argparse
import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from octavo.bench.common import Row, Spread, report
from octavo.bench.echo import CORE, STEP_MS
from octavo.engine.config import ConfigError

TICK = os.sysconf("SC_CLK_TCK")
PATIENCE = 60.0  # seconds for the server to start, and for its memory to settle
SERVE = (
    "import sys, argparse; from octavo.cli import serve; p = argparse.ArgumentParser(); "
    "serve.register(p.add_subparsers()); "
    f"sys.exit(serve.run(p.parse_args(['serve', *sys.argv[1:]]), core='{CORE}'))"
)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The model whose tokenizer is used, and the load."""
    parser.add_argument("model", nargs="?", default="smollm2-135m", help="whose tokenizer to use")
    for name, default, help in (
        ("streams", 256, "streams at once for `merged` and `single`"),
        ("output-len", 512, "tokens of each"),
        ("open-streams", 2000, "streams at once for `open`"),
        ("rounds", 3, "times each case runs"),
        ("api-server-count", 1, "API processes"),
    ):
        parser.add_argument(
            f"--{name}", type=int, default=default, metavar="N", help=f"{help} (default: {default})"
        )
    parser.add_argument(
        "--step-ms", type=float, default=9.0, metavar="X", help="pace of `single` (default: 9)"
    )
    parser.add_argument(
        "--cases", default="merged,single,open", help="which (default: merged,single,open)"
    )


def run(args: argparse.Namespace) -> int:
    """Measure each case on a server of its own."""
    rows: list[Row] = []
    for case in args.cases.split(","):
        if case not in ("merged", "single", "open"):
            raise ConfigError(f"there is no case {case}", "merged, single, open")
        pace = {"merged": 0.0, "single": args.step_ms, "open": 500.0}[case]
        with _server(args.model, args.api_server_count, pace) as server:
            if case == "open":
                rows += _open(server, args)
            else:
                rows += _throughput(case, server, args)
    settings = {
        key: getattr(args, key)
        for key in ("streams", "output_len", "open_streams", "step_ms", "api_server_count")
    }
    return report("frontend", settings, rows, args)


@dataclass
class _Server:
    port: int
    pid: int

    def processes(self) -> list[int]:
        """The server's process and its children, the engine's last."""
        found = subprocess.run(["pgrep", "-P", str(self.pid)], capture_output=True, text=True)
        return [self.pid, *map(int, found.stdout.split())]

    def cpu_seconds(self) -> float:
        return sum(_cpu_seconds(pid) for pid in self.processes())

    def resident(self) -> int:
        """Bytes of the API process (of all of them and their parent, where there are several)."""
        return sum(
            _resident(pid) for pid in self.processes() if b"engine.process" not in _command(pid)
        )


@contextmanager
def _server(model: str, count: int, step_ms: float) -> Iterator[_Server]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    command = [sys.executable, "-c", SERVE, model, "--port", str(port)]
    command += ["--api-server-count", str(count), "--served-model-name", "echo"]
    child = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        env={
            **os.environ,
            STEP_MS: str(step_ms),
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        },
    )
    try:
        _until_ready(port, child)
        yield _Server(port, child.pid)
    finally:
        child.send_signal(signal.SIGTERM)
        try:
            child.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def _until_ready(port: int, child: "subprocess.Popen[bytes]") -> None:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and child.poll() is None:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=1.0) as probe:
                probe.sendall(b"GET /ready HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
                if b" 200 " in probe.recv(4096):
                    return
        except OSError:
            pass
        time.sleep(0.1)
    raise ConfigError("the server did not become ready", "its own words are above")


class _Stream(asyncio.Protocol):
    """Sends one request and counts the chunks of its stream, without reading them."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self.chunks = 0
        self.tail = b""
        self.begun = asyncio.get_running_loop().create_future()
        self.ended = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self.chunks += data.count(b'"finish_reason":')
        self.tail = (self.tail + data)[-2048:] if len(data) < 2048 else data[-2048:]
        if self.chunks and not self.begun.done():
            self.begun.set_result(None)
        if self.tail.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"):
            self._transport.close()

    def close(self) -> None:
        self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        for future in (self.begun, self.ended):
            if not future.done():
                future.set_result(None)

    def tokens(self) -> int:
        """As its usage says; 0 when it did not end well."""
        if not self.tail.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"):
            return 0
        usage = self.tail.rpartition(b'"completion_tokens":')[2]
        return int(usage[: usage.index(b",")].rstrip(b"}"))


def _request(output_len: int) -> bytes:
    body = json.dumps(
        {
            "prompt": list(range(1000, 1032)),
            "max_tokens": output_len,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


async def _connect(port: int, request: bytes, count: int) -> list[_Stream]:
    loop = asyncio.get_running_loop()
    pairs = await asyncio.gather(
        *(loop.create_connection(lambda: _Stream(request), "127.0.0.1", port) for _ in range(count))
    )
    return [stream for _, stream in pairs]


async def _load(port: int, count: int, output_len: int) -> tuple[list[_Stream], float]:
    """All streams to their end, and the seconds from the first request to the last token."""
    began = time.perf_counter()
    streams = await _connect(port, _request(output_len), count)
    await asyncio.gather(*(stream.ended for stream in streams))
    return streams, time.perf_counter() - began


def _throughput(case: str, server: _Server, args: argparse.Namespace) -> list[Row]:
    rates, costs, ours, shares = [], [], [], []
    asyncio.run(_load(server.port, 16, 64))  # what is only needed once
    for _ in range(args.rounds):
        before, own = server.cpu_seconds(), time.process_time()
        streams, seconds = asyncio.run(_load(server.port, args.streams, args.output_len))
        spent, own = server.cpu_seconds() - before, time.process_time() - own
        tokens = sum(stream.tokens() for stream in streams)
        wanted = args.streams * args.output_len
        if tokens != wanted:
            raise ConfigError(f"{tokens} tokens came of {wanted}")
        rates.append(tokens / seconds)
        costs.append(1e6 * spent / tokens)
        ours.append(1e6 * own / tokens)
        shares.append(tokens / sum(stream.chunks for stream in streams))
    return [
        Row(case, "tok/s", Spread.of(rates), 0),
        Row(case, "tokens a chunk", Spread.of(shares), 3),
        Row(case, "server's processor time, us a token", Spread.of(costs), 1),
        Row(case, "load's processor time, us a token", Spread.of(ours), 1),
    ]


def _open(server: _Server, args: argparse.Namespace) -> list[Row]:
    async def hold() -> tuple[int, int, int]:
        streams = await _connect(server.port, _request(1 << 18), args.open_streams)
        await asyncio.gather(*(stream.begun for stream in streams))
        await asyncio.sleep(2.0)
        alive = sum(not stream.ended.done() for stream in streams)
        during = server.resident()
        for stream in streams:
            stream.close()
        return len(streams), alive, during

    asyncio.run(_load(server.port, 16, 16))
    before = server.resident()
    count, alive, during = asyncio.run(hold())
    if alive != count:
        raise ConfigError(f"{count - alive} of {count} streams ended with an error")
    return [
        Row("open", "streams at once", Spread.of([float(alive)]), 0),
        Row("open", "memory a stream, KiB", Spread.of([(during - before) / count / 1024]), 1),
    ]


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICK


def _resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _command(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()
