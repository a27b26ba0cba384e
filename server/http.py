"""One API process: uvicorn over a bound socket, and an end that lets streams finish."""

import asyncio
import contextlib
import errno
import gc
import logging
import resource
import signal
import socket
import time
from collections.abc import Callable, Iterator

import uvicorn

from octavo.engine.config import ConfigError
from octavo.server.app import create_app
from octavo.server.client import EngineClient
from octavo.server.frontend import Frontend
from octavo.server.protocol.errors import unavailable
from octavo.server.settings import ServerSettings
from octavo.server.tls import tls_context
from octavo.server.wire import WireLimits, protocol_within

BACKLOG = 4096  # connections that wait to be accepted: a burst of clients must not be refused
WANTED_FILES = 65_536  # tens of thousands of requests may wait, each on its connection
GRACE = 2.0  # seconds beyond the time-out, for the last frames to leave
logger = logging.getLogger("octavo.server")


def bind(settings: ServerSettings) -> socket.socket:
    """The listening socket. ConfigError when the port is taken or may not be used."""
    host, port = settings.host, settings.port
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(BACKLOG)  # here: two servers may both bind, only one may listen
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"port {port} on {host} is in use", f"--port {port + 1}, or --port 0 for a free one"
            ) from None
        reason = (error.strerror or str(error)).lower()
        raise ConfigError(
            f"cannot listen on {host} port {port}: {reason}", "--host 0.0.0.0 is all addresses"
        ) from None
    listener.setblocking(False)
    return listener


def allow_files(wanted: int) -> None:
    """Raise the soft limit of open files, one a connection, as far as the hard one lets us."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


class HttpServer(uvicorn.Server):
    """uvicorn that leaves signals to us, and returns after them instead of dying of them."""

    def __init__(self, frontend: Frontend, on_ready: Callable[[], None]) -> None:
        self._client: EngineClient = frontend.client
        self._timeout = frontend.settings.shutdown_timeout
        self._on_ready = on_ready
        self._settling: asyncio.Task[None] | None = None
        self.failed_start = False
        settings = frontend.settings
        tls = tls_context(settings)
        super().__init__(
            uvicorn.Config(
                create_app(frontend, on_start=self._on_start),
                http=protocol_within(_limits(frontend)),
                loop="uvloop",
                ws="none",
                ssl_context_factory=(lambda *_: tls) if tls is not None else None,
                access_log=False,
                log_level="error",
                lifespan="on",
                backlog=BACKLOG,
                server_header=False,
                timeout_keep_alive=settings.keep_alive_timeout,
                timeout_graceful_shutdown=int(self._timeout + GRACE) + 1,
                # No proxy stands between a probe and us unless the user says so.
                proxy_headers=False,
            )
        )

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    def _on_start(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop_asked)
        self._settling = loop.create_task(self._settle())

    async def _settle(self) -> None:
        """Wait for the engine: tell the user when it is ready, leave when it cannot start."""
        await self._client.settled.wait()
        if self._client.ready is None:
            self.failed_start = True
            self.should_exit = True
        else:
            gc.collect()
            gc.freeze()  # what start-up made lives on: no collection looks at it again
            self._on_ready()

    def _stop_asked(self) -> None:
        if self.should_exit:  # asked twice: now
            self._end_streams()
            self.force_exit = True
            return
        self.should_exit = True
        self._client.views.close()  # those who only look on need not be waited for
        open_requests = self._client.open_requests
        if open_requests:
            logger.warning(
                "stopping: %d requests may finish within %g s", open_requests, self._timeout
            )
        asyncio.get_running_loop().call_later(self._timeout, self._end_streams)

    def _end_streams(self) -> None:
        self._client.fail_all(unavailable("the server is shutting down"))


def _limits(frontend: Frontend) -> WireLimits:
    settings = frontend.settings
    return WireLimits(
        header_bytes=settings.max_header_bytes,
        header_count=settings.max_header_count,
        header_timeout=settings.header_timeout,
        body_timeout=settings.body_timeout,
        write_timeout=settings.write_timeout,
        on_refusal=frontend.client.figures.count_cut,
    )


def serve_http(
    frontend: Frontend, listener: socket.socket, on_ready: Callable[[float], None]
) -> bool:
    """Serve until a signal ends it. False when the engine never became ready.

    `on_ready` gets the seconds from here to the engine's readiness.
    """
    began = time.monotonic()
    allow_files(WANTED_FILES)
    server = HttpServer(frontend, lambda: on_ready(time.monotonic() - began))
    server.run(sockets=[listener])
    return not server.failed_start
