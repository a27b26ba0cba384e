"""`octavo serve` as several processes on this machine, each with CPU devices of its own."""

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import httpx

from tests.e2e.served import ROOT, START
from tests.server.conftest import Server, free_port

ENDS = 60.0  # seconds for processes to end, on two busy cores


@dataclass
class Cluster:
    """Servers by host index; the first is the leader."""

    hosts: list[Server]
    logs: list[Path]

    @property
    def leader(self) -> Server:
        return self.hosts[0]

    def engine_of(self, index: int) -> int:
        """The process id of a host's engine."""
        parent = str(self.hosts[index].process.pid)
        found = subprocess.run(["ps", "--ppid", parent, "-o", "pid="], capture_output=True)
        return int(found.stdout.split()[0])

    def ended(self, index: int) -> int:
        """The exit code of a host, which is about to end."""
        return self.hosts[index].process.wait(ENDS)

    def log(self, index: int) -> str:
        return self.logs[index].read_text()

    def close(self) -> None:
        for host in self.hosts:
            host.process.kill()
            host.process.wait()


def two_free_ports() -> int:
    """The first of two ports in a row: the second is for jax's runtime."""
    while True:
        first = free_port()
        if first < 65000 and _is_free(first + 1):
            return first


def _is_free(port: int) -> bool:
    import socket

    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def start(
    model: str, count: int, folder: Path, *flags: str, own: dict[int, str] | None = None
) -> Cluster:
    """The hosts of a cluster; `own` has a flag that one of them gets besides."""
    leader = f"127.0.0.1:{two_free_ports()}"
    hosts, logs = [], []
    for index in range(count):
        port, log = free_port(), folder / f"host{index}.log"
        command = [sys.executable, "-m", "octavo", "serve", model, "--port", str(port), *flags]
        more = [own[index]] if own and index in own else []
        environment = {
            "OCTAVO_HOSTS": str(count),
            "OCTAVO_HOST_INDEX": str(index),
            "OCTAVO_LEADER": leader,
        }
        with log.open("w") as file:
            process = subprocess.Popen(
                [*command, *more],
                stdout=file,
                stderr=subprocess.STDOUT,
                text=True,
                cwd=ROOT,
                env=os.environ | environment,
            )
        hosts.append(Server(f"http://127.0.0.1:{port}", process))
        logs.append(log)
    return Cluster(hosts, logs)


def until_ready(cluster: Cluster) -> Cluster:
    end = time.monotonic() + START
    for host, log in zip(cluster.hosts, cluster.logs, strict=True):
        while not _is_ready(host):
            assert host.process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.1)
    return cluster


def _is_ready(host: Server) -> bool:
    try:
        return host.get("/ready").status_code == 200
    except httpx.TransportError:
        return False
