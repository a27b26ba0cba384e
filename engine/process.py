"""The engine process: one EngineCore behind two ZeroMQ sockets.

    clients --requests--> inbox thread -> deque -> loop: take, turn, deliver --outputs--> clients

A client is an API process, known by the first byte of its ZeroMQ identity. Its handles use the low
24 bits; the engine's own handle carries the client above them, so that no table maps one to the
other. The loop tokenizes nothing, formats nothing and never waits for a client: one that stops
reading is dropped, and its work with it. Four times a second every client hears where the engine
stands; silence means a hung engine.
"""

import contextlib
import gc
import importlib
import json
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterator
from typing import Any, Protocol

import msgspec
import numpy as np
import zmq

from octavo.engine.config import ConfigError, EngineConfig
from octavo.engine.link import Leader
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
    ToEngine,
    View,
    Watch,
)
from octavo.engine.runner import GENERATES, core_of
from octavo.engine.watchers import Watchers

CORE = GENERATES  # and where nothing else is asked for, what reads for a model that only reads
HEARTBEAT = 0.25  # seconds between two Stats to every client
CLIENT_SHIFT = 24  # a handle of the engine is client << 24 | handle of that client
HANDLE_MASK = (1 << CLIENT_SHIFT) - 1
MAX_CLIENTS = 254
UNREAD = 20_000  # messages that a client may leave unread before it counts as gone
FAREWELL_MS = 2000  # how long the sockets stay open for the last messages


class Core(Protocol):
    """What the loop asks of an EngineCore."""

    def ready(self) -> Ready: ...
    def add(self, request: Any) -> None: ...  # AddRequest, or EncodeRequest where it reads
    def abort(self, handles: list[int]) -> None: ...
    def has_work(self) -> bool: ...
    def turn(self) -> list[Output]: ...
    def stats(self) -> Stats: ...
    def view(self) -> View: ...
    def unwatch(self) -> None: ...
    def close(self) -> None: ...


def requests_endpoint(address: str) -> str:
    """Where clients send AddRequest and Abort; `address` is a folder as ipc://folder."""
    return f"{address}/requests"


def outputs_endpoint(address: str) -> str:
    """Where clients say hello (one empty message) and read Ready, Output and Dead."""
    return f"{address}/outputs"


def client_identity(client: int) -> bytes:
    """The ZeroMQ identity of API process `client`; an identity may not begin with a zero byte."""
    return bytes([client + 1])


class Inbox(threading.Thread):
    """Decodes what clients send while the loop runs its turns."""

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]", address: str) -> None:
        super().__init__(name="octavo-inbox", daemon=True)
        self._socket = context.socket(zmq.ROUTER)
        self._socket.set_hwm(0)
        self._socket.bind(requests_endpoint(address))
        self._messages: deque[tuple[int, ToEngine]] = deque()
        self._arrived = threading.Event()

    def run(self) -> None:
        decoder = msgspec.msgpack.Decoder(ToEngine)
        with contextlib.suppress(zmq.ContextTerminated), self._socket:
            while True:
                identity, payload = self._socket.recv_multipart()
                try:
                    message = decoder.decode(payload)
                except msgspec.MsgspecError as error:
                    print(f"octavo: dropped a message that is none: {error}", file=sys.stderr)
                    continue
                self._messages.append((identity[0] - 1, message))
                self._arrived.set()

    def wait(self, timeout: float) -> None:
        """Sleep until something arrives, at most `timeout` seconds."""
        self._arrived.wait(timeout)

    def drain(self) -> Iterator[tuple[int, ToEngine]]:
        """What has arrived: (client, message), oldest first."""
        self._arrived.clear()
        while self._messages:
            yield self._messages.popleft()


class Outbox:
    """Sends to each client what is its own. Only the loop's thread uses it."""

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]", address: str) -> None:
        self._socket = context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # an error, not silence, for who is gone
        self._socket.setsockopt(zmq.SNDHWM, UNREAD)
        self._socket.setsockopt(zmq.LINGER, FAREWELL_MS)
        self._socket.bind(outputs_endpoint(address))
        self._encode = msgspec.msgpack.Encoder().encode
        self.clients: set[int] = set()
        self.last_words = ""  # what the clients were told at the end
        self.gone: set[int] = set()  # clients that left since the loop last looked

    def greet(self, ready: Ready | Dead) -> None:
        """Take in new clients; the first thing they hear is `ready`."""
        with contextlib.suppress(zmq.Again):
            while True:
                identity, _ = self._socket.recv_multipart(zmq.NOBLOCK)
                self.clients.add(identity[0] - 1)
                self.send(identity[0] - 1, ready)

    def send(self, client: int, message: FromEngine) -> None:
        try:
            parts = (client_identity(client), self._encode(message))
            self._socket.send_multipart(parts, zmq.NOBLOCK)
        except zmq.ZMQError:  # no route: it left; full: it hangs
            self.clients.discard(client)
            self.gone.add(client)

    def broadcast(self, message: FromEngine) -> None:
        for client in tuple(self.clients):
            self.send(client, message)

    def deliver(self, output: Output) -> None:
        """Send each client its part of `output`."""
        if self.clients <= {0}:  # one API process: the engine's handles are its handles
            self.send(0, output)
            return
        for client, part in split(output).items():
            self.send(client, part)
        if output.stats is not None:
            self.broadcast(Output(stats=output.stats))

    def close(self) -> None:
        self._socket.close()


def split(output: Output) -> dict[int, Output]:
    """The part of each client, with that client's own handles; the stats belong to nobody."""
    parts: dict[int, Output] = {}
    handles = np.frombuffer(output.handles, "<u4")
    tokens = np.frombuffer(output.tokens, "<i4")
    owners = handles >> CLIENT_SHIFT
    for client in np.unique(owners).tolist():
        mine = owners == client
        own = (handles[mine] & HANDLE_MASK).astype("<u4")
        parts[client] = Output(handles=own.tobytes(), tokens=tokens[mine].tobytes())
    for name in ("starts", "finished", "logprobs", "encoded"):
        for item in getattr(output, name):
            part = parts.get(item.handle >> CLIENT_SHIFT)
            if part is None:
                part = parts[item.handle >> CLIENT_SHIFT] = Output()
            own_item = msgspec.structs.replace(item, handle=item.handle & HANDLE_MASK)
            setattr(part, name, [*getattr(part, name), own_item])
    return parts


class Loop:
    """Turns of the core between two looks at the clients."""

    def __init__(self, core: Core, inbox: Inbox, outbox: Outbox) -> None:
        self._core, self._inbox, self._outbox = core, inbox, outbox
        self._ready = core.ready()
        self._alive: dict[int, set[int]] = {}  # the engine's handles of each client
        self._next_beat = 0.0
        self._watchers = Watchers()
        self.stopping = False

    def run(self) -> None:
        """Serve until `stopping` is set and all that was accepted is done."""
        while True:
            self._take_messages()
            if self._core.has_work():
                for output in self._core.turn():
                    self._forget(output.finished)
                    self._outbox.deliver(output)
            elif self.stopping:
                return
            else:
                due = min(self._next_beat, self._watchers.due)
                self._inbox.wait(max(0.0, due - time.monotonic()))
            now = time.monotonic()
            if now >= self._next_beat:
                self._beat()
            if now >= self._watchers.due:
                self._show(now)

    def _take_messages(self) -> None:
        for client, message in self._inbox.drain():
            base = client << CLIENT_SHIFT
            if isinstance(message, Abort):
                handles = [base | handle for handle in message.handles]
                self._core.abort(handles)
                self._alive.get(client, set()).difference_update(handles)
            elif isinstance(message, Watch):
                self._watch(client, message)
            elif self.stopping:
                self._refuse(base | message.handle, message, "the server is shutting down", 503)
            else:
                self._add(client, message)

    def _watch(self, client: int, watch: Watch) -> None:
        self._watchers.renew(client, watch, time.monotonic())
        if not self._watchers:
            self._core.unwatch()

    def _show(self, now: float) -> None:
        """Send a view to those who watch; nothing here runs while nobody does."""
        watching = self._watchers.take(now)
        if not watching:
            self._core.unwatch()
            return
        view = self._core.view()
        for client in watching:
            self._outbox.send(client, view)

    def _add(self, client: int, request: AddRequest | EncodeRequest) -> None:
        request.handle |= client << CLIENT_SHIFT
        try:
            if isinstance(request, EncodeRequest) != (self._ready.pooler is not None):
                raise ValueError("the engine does not do this: --runner says what it does")
            self._core.add(request)
        except ValueError as error:  # the request's fault, not the engine's
            self._refuse(request.handle, request, str(error), 400)
            return
        handles = range(request.handle, request.handle + choices(request))
        self._alive.setdefault(client, set()).update(handles)

    def _refuse(
        self, handle: int, request: AddRequest | EncodeRequest, message: str, status: int
    ) -> None:
        self._outbox.deliver(
            Output(
                finished=[
                    Finish(handle + i, "error", message=message, status=status)
                    for i in range(choices(request))
                ]
            )
        )

    def _forget(self, finished: list[Finish]) -> None:
        for finish in finished:
            owner = self._alive.get(finish.handle >> CLIENT_SHIFT)
            if owner is not None:
                owner.discard(finish.handle)

    def _beat(self) -> None:
        self._next_beat = time.monotonic() + HEARTBEAT
        self._outbox.greet(self._ready)
        self._outbox.broadcast(Output(stats=self._core.stats()))
        while self._outbox.gone:  # nobody will read what these asked for
            handles = self._alive.pop(self._outbox.gone.pop(), set())
            self._core.abort(sorted(handles))


def choices(request: AddRequest | EncodeRequest) -> int:
    """Sequences of a request: handles in a row."""
    return 1 if isinstance(request, EncodeRequest) else request.sampling.n


def run_engine(config: EngineConfig, address: str, core: str = CORE) -> int:
    """Build the engine `core` ("module:class") and serve it at `address`; returns the exit code."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    inbox, outbox = Inbox(context, address), Outbox(context, address)
    inbox.start()
    engine: Core | None = None
    leader: Leader | None = None
    code = 0
    try:  # until it is ready, a signal ends it at once: nothing has been accepted
        if config.hosts != 1:
            leader = importlib.import_module("octavo.engine.team").lead(config, address)
        engine = _build(core, config, leader)
        loop = Loop(engine, inbox, outbox)
        _on_stop_signals(lambda *_: setattr(loop, "stopping", True))
        gc.collect()
        gc.freeze()  # what start-up made lives on: no collection looks at it again
        loop.run()
    except ConfigError as error:
        code = _farewell(outbox, str(error), exit_code=2)
    except Exception as error:
        lost = leader.why() if leader is not None else ""
        if not lost:
            traceback.print_exc()
        code = _farewell(outbox, lost or f"{type(error).__name__}: {error}", exit_code=1)
    if leader is not None:
        leader.stop(outbox.last_words)
    if engine is not None:
        with contextlib.suppress(Exception):  # it may be what failed
            engine.close()
    outbox.close()
    context.term()
    return code


def _build(core: str, config: EngineConfig, leader: Leader | None = None) -> Core:
    """The engine itself: only here does this process begin to import jax."""
    own = core != CORE
    module, name = (core if own else core_of(config)).split(":")
    make = getattr(importlib.import_module(module), name)
    engine: Core
    if own:
        engine = make(config)
        return engine
    with importlib.import_module("octavo.engine.progress").startup_progress() as progress:
        more = {} if leader is None else {"leader": leader}
        engine = make(config, progress=progress, **more)
    return engine


def _farewell(outbox: Outbox, message: str, exit_code: int) -> int:
    """Tell every client, those who come within a moment too, why this engine ends."""
    _on_stop_signals(signal.SIG_IGN)  # it is ending already, with an exit code of its own
    dead, outbox.last_words = Dead(message), message
    outbox.broadcast(dead)
    until = time.monotonic() + 1.0
    while time.monotonic() < until and not outbox.clients:
        outbox.greet(dead)
        time.sleep(0.02)
    return exit_code


def _on_stop_signals(handler: Any) -> None:
    # Handlers only set a flag: an Event set from a handler can deadlock with the thread it stopped.
    signal.signal(signal.SIGTERM, handler)
    signal.signal(signal.SIGINT, handler)


def _end_with_parent(address: str) -> None:
    """The parent holds the other end of stdin: its end is ours, and its folder has no owner."""
    while sys.stdin.buffer.read(4096):
        pass
    shutil.rmtree(address.removeprefix("ipc://"), ignore_errors=True)
    os._exit(1)


def main() -> None:
    """Entry of the child: one JSON line on stdin says what to run."""
    order = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with_parent, args=(order["address"],), daemon=True).start()
    config = EngineConfig(**order["config"])
    if config.host_index > 0:
        follower = importlib.import_module("octavo.engine.follower")
        code = follower.run_follower(config, order["address"])
    else:
        code = run_engine(config, order["address"], order["core"])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # no destructor of a device runtime may hang a finished process
