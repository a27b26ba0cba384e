"""The leader's line to the other hosts: orders there, and the news of a host that is lost.

One ZeroMQ connection a host, over TCP. Both ends send heartbeats below the messages, so that a
host without power shows within SILENCE seconds and one whose process ended at once. No jax here.
"""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import msgspec
import zmq
from zmq.utils.monitor import recv_monitor_message

from octavo.engine.config import ConfigError
from octavo.engine.orders import (
    Built,
    Bye,
    FromFollower,
    FromLeader,
    Hello,
    Memory,
    Order,
    Probe,
    Stop,
    Trouble,
    Welcome,
    thickened,
    thinned,
)

SILENCE = 6.0  # seconds without a heartbeat after which a host counts as lost
GRACE = 4.0  # seconds for the engine to end by itself, once a host is lost
JOIN = 600.0  # seconds for all hosts to come
BUILD = 3600.0  # seconds for all hosts to load and compile
FAREWELL = 3.0  # seconds for the others to say that they end
TICK = 0.1  # seconds between two looks at the line

GONE = (
    "host {} is gone: its process ended or cannot be reached, and without it no step can run; "
    "start every host again"
)


class HostLost(RuntimeError):
    """Another host is gone, and with it the engine."""


def _options(socket: Any) -> None:
    socket.set_hwm(0)
    socket.setsockopt(zmq.LINGER, 1000)
    socket.setsockopt(zmq.IPV6, 1)
    socket.setsockopt(zmq.HEARTBEAT_IVL, 1000)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, int(SILENCE * 1000))
    socket.setsockopt(zmq.HEARTBEAT_TTL, int(SILENCE * 1000))


def name_of(index: int) -> bytes:
    """The ZeroMQ identity of a host."""
    return b"host%d" % index


def differing(mine: Mapping[str, str], theirs: Mapping[str, str]) -> str:
    """The first fact in which two hosts differ, as words; empty where they agree."""
    for name in sorted({*mine, *theirs}):
        own, other = mine.get(name, "none"), theirs.get(name, "none")
        if own != other:
            return f"`{name}` {other}, the leader with {own}"
    return ""


class _Line:
    """A socket that two threads use, and what it has heard of its other end."""

    def __init__(self, kind: int, ended: Callable[[str], None]) -> None:
        """`ended` is called on another thread, once, when the engine cannot go on."""
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket: Any = self._context.socket(kind)
        _options(self._socket)
        self._monitor: Any = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._lock = threading.Lock()  # of the socket
        self._encode = msgspec.msgpack.Encoder().encode
        self._ended = ended
        self._closing = threading.Event()
        self._known = threading.Event()  # that it is lost
        self.lost = ""  # why

    def _lose(self, why: str) -> None:
        if not self._known.is_set() and not self._closing.is_set():
            self.lost = why
            self._known.set()
            self._ended(why)

    def _cut_off(self) -> bool:
        """Whether a connection ended since the last call; waits a moment for one."""
        if not self._monitor.poll(int(TICK * 1000)):
            return False
        recv_monitor_message(self._monitor)
        return True

    def why(self, timeout: float = 3.0) -> str:
        """Why it is lost, once that is known; empty where nothing is."""
        self._known.wait(timeout)
        return self.lost

    def _close(self) -> None:
        self._closing.set()


class Leader(_Line):
    """The end of host 0."""

    def __init__(self, port: int, hosts: int, ended: Callable[[str], None]) -> None:
        """Listen. Raises ConfigError where the port cannot be had."""
        super().__init__(zmq.ROUTER, ended)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self.others = range(1, hosts)
        self.orders = self.order_bytes = 0  # sent to every host
        self._decode = msgspec.msgpack.Decoder(FromFollower).decode
        self._heard: dict[type, dict[int, Any]] = {}  # the last of each kind, by host
        self._news = threading.Condition()
        self._joined: set[int] = set()
        try:
            self._socket.bind(f"tcp://*:{port}")
        except zmq.ZMQError as error:
            raise ConfigError(
                f"the leader cannot listen on port {port}: {error.strerror.lower()}",
                "--leader names another port, on every host",
            ) from None
        self._thread = threading.Thread(target=self._watch, name="octavo-hosts", daemon=True)
        self._thread.start()

    # --- before the first step

    def gather(self, facts: Mapping[str, str]) -> None:
        """Wait for every host. Raises ConfigError where one differs in `facts` or stays away."""
        for index, hello in sorted(self._all(Hello, JOIN).items()):
            if words := differing(facts, hello.facts):
                raise ConfigError(
                    f"host {index} was started with {words}",
                    "every host needs the same versions and the same settings",
                )
        self._joined = set(self.others)
        self._tell(Welcome())

    def agree(self, limit: int) -> int:
        """The least memory that any host has for a device."""
        limit = min(limit, *(m.limit for m in self._all(Memory, BUILD).values()))
        self._tell(Memory(limit))
        return limit

    def built(self, digest: str) -> None:
        """Wait until every host can run. Raises ConfigError where one made other programs."""
        for index, built in sorted(self._all(Built, BUILD).items()):
            if built.digest != digest:
                raise ConfigError(
                    f"host {index} came to other sizes than the leader from the same settings",
                    "compare the model's files and the devices of both hosts",
                )

    def _all(self, kind: type, timeout: float) -> dict[int, Any]:
        end = time.monotonic() + timeout
        with self._news:
            while len(got := self._heard.setdefault(kind, {})) < len(self.others):
                if self.lost:
                    raise HostLost(self.lost)
                if time.monotonic() > end:
                    missing = ", ".join(str(i) for i in self.others if i not in got)
                    raise ConfigError(
                        f"waited {timeout:.0f} s for host {missing}",
                        "start every host with the same --hosts and --leader",
                    )
                self._news.wait(TICK)
            return dict(got)

    # --- steps

    def order(self, order: Order) -> None:
        """Send an order to every host; HostLost where one is gone."""
        self.orders += 1
        self.order_bytes += self._tell(thinned(order))

    def _tell(self, message: FromLeader) -> int:
        if self.lost:
            raise HostLost(self.lost)
        payload = self._encode(message)
        for index in self.others:
            try:
                with self._lock:
                    self._socket.send_multipart((name_of(index), payload), zmq.NOBLOCK)
            except zmq.ZMQError:
                self._lose(GONE.format(index))
                raise HostLost(self.lost) from None
        return len(payload)

    def stop(self, message: str = "") -> None:
        """Tell every host that can still be reached to end, and wait a moment until they did."""
        if self._closing.is_set():
            return
        self._closing.set()
        payload = self._encode(Stop(message))
        told = 0
        for index in self.others:
            with contextlib.suppress(zmq.ZMQError), self._lock:
                self._socket.send_multipart((name_of(index), payload), zmq.NOBLOCK)
                told += 1
        end = time.monotonic() + FAREWELL
        while time.monotonic() < end and len(self._heard.get(Bye, {})) < told:
            time.sleep(TICK / 4)
        time.sleep(TICK)  # their processes end after the word

    # --- the other thread

    def _watch(self) -> None:
        doubtful = 0.0  # until when: a connection ends a little before its host is forgotten
        with contextlib.suppress(zmq.ZMQError):
            while True:
                if self._cut_off():
                    doubtful = time.monotonic() + SILENCE
                if time.monotonic() < doubtful:
                    self._find_lost()
                while (got := self._receive()) is not None:
                    self._take(*got)

    def _receive(self) -> tuple[int, Any] | None:
        with self._lock:
            try:
                identity, payload = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return None
        index = int(identity[4:]) if identity[4:].isdigit() else 0
        try:
            return index, self._decode(payload)
        except msgspec.MsgspecError:
            return index, None  # something else knocked at the port

    def _take(self, index: int, message: Any) -> None:
        if message is None or index not in self.others:
            return
        if isinstance(message, Trouble):
            self._lose(f"host {index} cannot go on: {message.message}")
        elif isinstance(message, Hello) and self._joined:
            self._lose(f"host {index} was lost and came back: every host must start again")
        with self._news:
            self._heard.setdefault(type(message), {})[index] = message
            self._news.notify_all()

    def _find_lost(self) -> None:
        """Which of those that joined cannot be reached any more."""
        payload = self._encode(Probe())
        for index in sorted(self._joined or self._heard.get(Hello, {})):
            try:
                with self._lock:
                    self._socket.send_multipart((name_of(index), payload), zmq.NOBLOCK)
            except zmq.ZMQError:
                if self._joined:
                    self._lose(GONE.format(index))
                else:  # it may come again
                    self._heard[Hello].pop(index, None)


class Follower(_Line):
    """The end of another host."""

    def __init__(self, host: str, port: int, index: int, ended: Callable[[str], None]) -> None:
        super().__init__(zmq.DEALER, ended)
        self._where = f"{host}:{port}"
        self._decode = msgspec.msgpack.Decoder(FromLeader).decode
        self._index, self._joined = index, False
        self._socket.setsockopt(zmq.IDENTITY, name_of(index))
        self._socket.connect(f"tcp://{self._where}")
        threading.Thread(target=self._watch, name="octavo-hosts", daemon=True).start()

    def join(self, facts: Mapping[str, str]) -> None:
        """Meet the leader and the others. Raises ConfigError where they do not want this host."""
        self._say(Hello(self._index, dict(facts)))
        self._next(Welcome, JOIN)
        self._joined = True

    def agree(self, limit: int) -> int:
        """The least memory that any host has for a device."""
        self._say(Memory(limit))
        return int(self._next(Memory, BUILD).limit)

    def built(self, digest: str) -> None:
        """This host can run."""
        self._say(Built(digest))

    def orders(self) -> Iterator[Order | None]:
        """What to run, until the leader ends; None where nothing came for a moment.

        Raises ConfigError where the leader says why it ends, HostLost where it is gone.
        """
        step = 0
        while True:
            message = self._receive(time.monotonic() + TICK)
            if message is None:
                yield None
            if isinstance(message, Stop):
                self._leave(message)
                return
            if isinstance(message, Order):
                step += 1
                if message.step != step:
                    raise HostLost(f"the leader sent step {message.step} instead of {step}")
                yield thickened(message)

    def trouble(self, message: str) -> None:
        """Tell the leader that this host cannot go on."""
        with contextlib.suppress(zmq.ZMQError):
            self._say(Trouble(message))
            time.sleep(TICK)

    def _say(self, message: FromFollower) -> None:
        with self._lock:
            self._socket.send(self._encode(message), zmq.NOBLOCK)

    def _next(self, kind: type, timeout: float) -> Any:
        end = time.monotonic() + timeout
        while (message := self._receive(end)) is not None:
            if isinstance(message, Stop):
                self._leave(message)
                raise ConfigError("the leader stopped before every host was ready")
            if isinstance(message, kind):
                return message
        raise ConfigError(
            f"no leader answered at {self._where} within {timeout:.0f} s",
            "start every host with the same --hosts and --leader",
        )

    def _receive(self, end: float) -> Any:
        """The next message; None where none came before `end`."""
        while time.monotonic() < end:
            if self.lost:
                raise HostLost(self.lost)
            if self._socket.poll(int(TICK * 1000)):
                with self._lock:
                    return self._decode(self._socket.recv(zmq.NOBLOCK))
        return None

    def _leave(self, stop: Stop) -> None:
        self._closing.set()
        self._say(Bye())
        if stop.message:
            raise ConfigError(f"the leader stopped: {stop.message}")

    def _watch(self) -> None:
        with contextlib.suppress(zmq.ZMQError):
            while True:
                if self._cut_off() and self._joined:
                    time.sleep(TICK)  # a Stop may be there, unread
                    self._lose(f"the leader at {self._where} is gone")


def ready_file(address: str) -> str:
    """What a follower writes when it can run."""
    return os.path.join(address.removeprefix("ipc://"), "ready")


def last_words(address: str) -> str:
    """What the engine at this address left to be said of its end; mostly nothing."""
    try:
        with open(last_words_file(address)) as file:
            return file.read()
    except OSError:
        return ""


def last_words_file(address: str) -> str:
    """Where an engine that is ended from outside of its loop leaves why."""
    return os.path.join(address.removeprefix("ipc://"), "last-words")


def end_process(address: str) -> Callable[[str], None]:
    """What to do when a host is lost: write down why, give the engine a moment, end the process.

    A loop that waits for the lost host's part of a collective may never come back by itself.
    """

    def ended(why: str) -> None:
        with contextlib.suppress(OSError), open(last_words_file(address), "w") as file:
            file.write(why)
        timer = threading.Timer(GRACE, os._exit, args=(1,))
        timer.daemon = True
        timer.start()

    return ended
