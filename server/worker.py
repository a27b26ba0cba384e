"""API processes: one here, or several children that share the listening socket and the engine.

The parent of several speaks no HTTP. It starts them, starts one again that ended on its own, passes
signals on, and sees to it that the engine outlives the last of them.
"""

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable

from octavo import __version__
from octavo.engine.config import ConfigError, EngineConfig
from octavo.engine.link import last_words
from octavo.engine.text.opened import ModelText, open_text
from octavo.engine.text.processor import OutputProcessor
from octavo.server.client import EngineClient
from octavo.server.frontend import Frontend
from octavo.server.http import GRACE, serve_http
from octavo.server.keys import with_all_keys
from octavo.server.launch import EngineProcess
from octavo.server.logs import set_up as set_up_logs
from octavo.server.settings import ServerSettings
from octavo.server.tls import tls_context
from octavo.server.tracing import check_tracing

NO_ENGINE = 3  # exit code of an API process whose engine never became ready
LOOK = 0.2  # seconds between two looks at the children
ENGINE_GRACE = 10.0  # seconds for the engine to end once no request is open


def serve_one(
    settings: ServerSettings,
    config: EngineConfig,
    text: ModelText,
    listener: socket.socket,
    *,
    address: str,
    ended: Callable[[], str | None],
    number: int = 0,
) -> EngineClient:
    """Speak HTTP in this process until told to stop. ConfigError when the engine cannot start."""
    client = EngineClient(
        address,
        OutputProcessor(text.tokenizer),
        client=number,
        ended=ended,
        max_queued=max(1, config.max_num_queued_reqs // settings.api_server_count),
        hung_after=settings.hung_after,
    )
    frontend = Frontend(settings, config, text, client, address.removeprefix("ipc://"))
    url = url_of(settings, listener)

    def on_ready(seconds: float) -> None:
        if number == 0:
            print("\n".join(welcome(frontend, url, seconds)), flush=True)

    if not serve_http(frontend, listener, on_ready):
        message, _, hint = (client.last_words or "the engine did not start").partition("\nhint: ")
        raise ConfigError(message, hint)
    return client


def url_of(settings: ServerSettings, listener: socket.socket) -> str:
    """Where a program on this machine finds the server."""
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(settings.host, settings.host)
    scheme = "https" if settings.ssl_certfile else "http"
    return f"{scheme}://{host}:{listener.getsockname()[1]}"


def welcome(frontend: Frontend, url: str, seconds: float) -> list[str]:
    """The lines that say it works, and one to try it with."""
    ready = frontend.client.ready
    key = " -H 'Authorization: Bearer KEY'" if frontend.settings.api_key else ""
    key += " --cacert CERTFILE" if frontend.settings.ssl_certfile else ""
    if ready is not None and ready.pooler is not None:
        path, body = "embeddings", '{"input": "Hello"}'
        if ready.pooler.task == "score":
            path, body = "score", '{"text_1": "Hello", "text_2": "Good day"}'
    elif frontend.chats:
        path, body = "chat/completions", '{"messages": [{"role": "user", "content": "Hello"}]}'
    else:
        path, body = "completions", '{"prompt": "Hello"}'
    return [
        f"octavo {__version__} serves {', '.join(frontend.names)}",
        *(f"  {line}" for line in (ready.summary if ready else [])),
        f"listening on {url}, ready in {seconds:.1f} s",
        f"try: curl {url}/v1/{path}{key} -H 'Content-Type: application/json' -d '{body}'",
    ]


def serve(
    settings: ServerSettings, config: EngineConfig, listener: socket.socket, core: str
) -> int:
    """Start the engine, speak HTTP, end both; the exit code."""
    settings = with_all_keys(settings)
    tls_context(settings)
    check_tracing(settings)
    text = open_text(config, settings.chat_template)  # says what is wrong before anything starts
    engine = EngineProcess(config, core)
    try:
        if settings.api_server_count > 1:
            return Workers(settings, config, listener, engine).run()
        client = serve_one(
            settings, config, text, listener, address=engine.address, ended=engine.ended
        )
        return 1 if client.last_words is not None else 0
    finally:
        engine.stop(ENGINE_GRACE)


class Workers:
    """The API processes as children."""

    def __init__(
        self,
        settings: ServerSettings,
        config: EngineConfig,
        listener: socket.socket,
        engine: EngineProcess,
    ) -> None:
        self._settings, self._listener, self._engine = settings, listener, engine
        self._order = {
            "settings": dataclasses.asdict(settings),
            "config": dataclasses.asdict(config),
            "address": engine.address,
            "engine_pid": engine.pid,
            "family": int(listener.family),
            "listener": listener.fileno(),
        }
        self._stopping = False

    def run(self) -> int:
        """Until a signal ends it; the exit code."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop_asked)
        children = {i: self._start(i) for i in range(self._settings.api_server_count)}
        while not self._stopping:
            time.sleep(LOOK)
            self._engine.ended()  # collects it, so that the children see that it is gone
            for i, child in children.items():
                code = child.poll()
                if code == NO_ENGINE:  # it has said why
                    return self._end(children, 2)
                if code is not None and not self._stopping:
                    print(f"octavo: API process {i} ended with {code}, another starts", flush=True)
                    children[i] = self._start(i)
        return self._end(children, 0 if self._engine.exit_code is None else 1)

    def _stop_asked(self, *_: object) -> None:
        self._stopping = True

    def _start(self, number: int) -> "subprocess.Popen[bytes]":
        child = subprocess.Popen(
            [sys.executable, "-c", "from octavo.server.worker import main; main()"],
            stdin=subprocess.PIPE,
            pass_fds=[self._listener.fileno()],
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        assert child.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            child.stdin.write(json.dumps({**self._order, "number": number}).encode() + b"\n")
            child.stdin.flush()
        return child

    def _end(self, children: dict[int, "subprocess.Popen[bytes]"], code: int) -> int:
        self._listener.close()
        for child in children.values():
            child.terminate()
        until = time.monotonic() + self._settings.shutdown_timeout + 2 * GRACE
        for child in children.values():
            try:
                child.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
        return code


def main() -> None:
    """Entry of an API process that is a child: one JSON line on stdin says what to serve."""
    order = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    settings, config = ServerSettings(**order["settings"]), EngineConfig(**order["config"])
    set_up_logs(settings.log_json)
    listener = socket.socket(order["family"], socket.SOCK_STREAM, fileno=order["listener"])
    try:
        serve_one(
            settings,
            config,
            open_text(config, settings.chat_template),
            listener,
            address=order["address"],
            ended=lambda: _ended(order["engine_pid"], order["address"]),
            number=order["number"],
        )
    except ConfigError as error:
        if order["number"] == 0:
            print(f"error: {error}", file=sys.stderr)
        raise SystemExit(NO_ENGINE) from None


def _end_with_parent() -> None:
    """The parent holds the other end of stdin: without it nobody would ever stop this process."""
    while os.read(sys.stdin.fileno(), 4096):  # sys.stdin itself would hold up the end of Python
        pass
    os._exit(1)


def _ended(pid: int, address: str) -> str | None:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return last_words(address) or "the engine process ended"
    return None
