"""The process of a host that is not the leader: an engine, and a word to probes on the same port.

The leader owns the endpoint; whoever asks here is told where that is.
"""

import json
import signal
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from octavo.engine.config import EngineConfig
from octavo.engine.link import ready_file
from octavo.server.launch import EngineProcess
from octavo.server.settings import ServerSettings

LOOK = 0.1  # seconds between two looks at the engine
GRACE = 15.0  # seconds beyond the leader's own time to finish


class _Probes(ThreadingHTTPServer):
    """Answers /health and /ready on a socket that listens already."""

    daemon_threads = True

    def __init__(self, listener: socket.socket, config: EngineConfig, ready: Path) -> None:
        super().__init__(listener.getsockname()[:2], _Answer, bind_and_activate=False)
        self.socket.close()
        self.socket = listener
        self.config, self.is_ready = config, ready.exists

    def handle_error(self, request: object, client_address: object) -> None:
        """A probe that hangs up early is nobody's trouble."""


class _Answer(BaseHTTPRequestHandler):
    server: _Probes
    timeout = 5.0

    def do_GET(self) -> None:
        config, ready = self.server.config, self.server.is_ready()
        index, leader = config.host_index, config.leader
        if self.path == "/health" or (self.path == "/ready" and ready):
            self._say(200, {"status": "ok", "host": index, "leader": leader})
        elif self.path == "/ready":
            self._say(503, _error(f"host {index} is still starting"))
        else:
            self._say(404, _error(f"host {index} only answers /health and /ready: ask the leader"))

    def do_POST(self) -> None:
        self.close_connection = True
        self._say(404, _error(f"host {self.server.config.host_index} is not the leader: ask that"))

    def _say(self, status: int, body: dict[str, object]) -> None:
        payload = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, format: str, *args: object) -> None:
        """Probes are not worth a line each."""


def _error(message: str) -> dict[str, object]:
    return {"error": {"message": message, "type": "not_found", "code": None}}


def follow(settings: ServerSettings, config: EngineConfig, listener: socket.socket) -> int:
    """Until the leader ends: 0 where that was a clean end, the engine's exit code otherwise."""
    asked = [0.0, 0]  # when to stop at the latest, and how often that was asked for

    def stop(*_: object) -> None:
        asked[0] = asked[0] or time.monotonic() + settings.shutdown_timeout + GRACE
        asked[1] += 1

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    engine = EngineProcess(config)
    ready = Path(ready_file(engine.address))
    probes = _Probes(listener, config, ready)
    threading.Thread(target=probes.serve_forever, args=(LOOK,), daemon=True).start()
    print(f"host {config.host_index} of {config.hosts}, leader {config.leader}", flush=True)
    told = False
    try:
        while (ended := engine.ended()) is None:
            if ready.exists() and not told:
                told = True
                lines = [f"  {line}" for line in ready.read_text().splitlines()]
                print("\n".join([*lines, "ready; the leader has the endpoint"]), flush=True)
            if asked[1] > 1 or (asked[0] and (not told or time.monotonic() > asked[0])):
                return 0 if not told else 1  # still starting, or asked twice, or out of time
            time.sleep(LOOK)
        if engine.exit_code != 0:
            if engine.exit_code == -signal.SIGABRT:
                ended += f": jax does that when the leader, {config.leader}, is gone"
            print(f"error: {ended}", file=sys.stderr, flush=True)
        return engine.exit_code if engine.exit_code in (0, 2) else 1
    finally:
        probes.shutdown()
        engine.stop(0.0)
