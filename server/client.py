"""EngineClient: this process's end of the two sockets, and the generations that wait on it.

One reader on the event loop decodes each step's message, hands it to the OutputProcessor and gives
every RequestOutput to its Generation. A reader of a Generation owns it: when it goes away, so does
the work.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Callable

import msgspec
import zmq

from octavo.engine.messages import (
    Abort,
    AddRequest,
    Dead,
    FromEngine,
    Output,
    Ready,
    Stats,
    ToEngine,
    View,
    Watch,
)
from octavo.engine.process import (
    HANDLE_MASK,
    client_identity,
    outputs_endpoint,
    requests_endpoint,
)
from octavo.engine.text.processor import OutputProcessor
from octavo.server.encodings import Encodings
from octavo.server.figures import Figures
from octavo.server.generation import Generation as Generation
from octavo.server.protocol.errors import ApiError, bad_request, unavailable
from octavo.server.views import Views

HUNG_AFTER = 30.0  # seconds without a word from a ready engine
TURN = 0.002  # seconds of outputs taken in before the streams may send
START_WAIT = 5.0  # seconds that a request may wait for the engine: API processes differ by one
WATCH = 0.25  # seconds between two looks at the engine's pulse
LATE = 0.5  # seconds after its time limit at which a request is given up on without the engine
RETRY_AFTER = 1  # seconds: a queue of thousands moves within one
logger = logging.getLogger("octavo.server")


class EngineClient:
    """Speaks to the engine process at `address` as API process number `client`."""

    def __init__(
        self,
        address: str,
        processor: OutputProcessor,
        *,
        client: int = 0,
        ended: Callable[[], str | None] = lambda: None,
        max_queued: int = 16384,
        hung_after: float = HUNG_AFTER,
    ) -> None:
        """`ended` says how the engine's process ended, None while it lives."""
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._requests = self._dealer(requests_endpoint(address), client)
        self._outputs = self._dealer(outputs_endpoint(address), client)
        self._descriptor = int(self._outputs.getsockopt(zmq.FD))
        self._decode = msgspec.msgpack.Decoder(FromEngine).decode
        self._encode = msgspec.msgpack.Encoder().encode
        self._processor, self._ended = processor, ended
        self._max_queued, self._hung_after = max_queued, hung_after
        self._alive: dict[str, Generation] = {}  # by the request's id
        self._used: set[int] = set()  # the handles of what is alive
        self.encodings = Encodings(self, max_queued)
        self._queued: dict[int, Generation] = {}  # without a slot, by their first handles
        self._deadlines: dict[str, float] = {}  # when to give up, by the request's id
        self._next_handle = 0
        self._heard = time.monotonic()
        self._watch: asyncio.Task[None] | None = None
        self.stats = Stats()
        self.folder, self.number = address.removeprefix("ipc://"), client
        self.figures = Figures()
        self.views = Views(self._ask_views)
        self.ready: Ready | None = None
        self.last_words: str | None = None
        self.settled = asyncio.Event()  # ready or dead

    def _dealer(self, endpoint: str, client: int) -> "zmq.Socket[bytes]":
        socket = self._context.socket(zmq.DEALER)
        socket.setsockopt(zmq.IDENTITY, client_identity(client))
        socket.setsockopt(zmq.LINGER, 0)
        socket.set_hwm(0)
        socket.connect(endpoint)
        return socket

    def start(self) -> None:
        """Say hello and listen; needs a running event loop."""
        self._outputs.send(b"")
        loop = asyncio.get_running_loop()
        loop.add_reader(self._descriptor, self._read)
        self._watch = loop.create_task(self._keep_watch())

    async def close(self) -> None:
        """Cancel what is alive and close the sockets."""
        for generation in tuple(self._alive.values()):
            generation.cancel()
        if self._watch is not None:
            asyncio.get_running_loop().remove_reader(self._descriptor)
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)
        self._requests.close(linger=200)
        self._outputs.close()
        self._context.term()

    @property
    def open_requests(self) -> int:
        """Requests that have not ended."""
        return len(self._alive) + len(self.encodings)

    def trouble(self) -> str | None:
        """Why the engine cannot be used, in a sentence; None when it can."""
        if self.last_words is not None:
            return f"the engine stopped: {self.last_words}"
        if self.ready is None:
            return "the engine is still starting"
        silence = time.monotonic() - self._heard
        if silence > self._hung_after:
            return f"the engine has not answered for {silence:.0f} s"
        return None

    async def until_ready(self) -> None:
        """Wait a moment for a start that is almost done; ApiError 503 when nobody can be served."""
        if self.ready is None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.settled.wait(), START_WAIT)
        self.check_room()

    def check_room(self) -> None:
        """ApiError 503 when the engine cannot be used or too many requests wait already."""
        trouble = self.trouble()
        if trouble is not None:
            self.figures.refused[("engine_unavailable",)] += 1
            raise unavailable(trouble, None if self.last_words else RETRY_AFTER)
        if len(self._queued) >= self._max_queued:
            self.figures.refused[("queue_full",)] += 1
            raise unavailable(
                f"{len(self._queued)} requests wait already, the limit of --max-num-queued-reqs: "
                "try again later",
                RETRY_AFTER,
            )

    def new_handle(self, n: int) -> int:
        """The first of `n` handles in a row that no living sequence has."""
        while True:
            if self._next_handle + n > HANDLE_MASK:
                self._next_handle = 0
            first = self._next_handle
            self._next_handle += n
            if self._used.isdisjoint(range(first, first + n)):
                return first

    def reserve(self, n: int) -> range:
        """`n` handles in a row, until they are released."""
        first = self.new_handle(n)
        self._used.update(range(first, first + n))
        return range(first, first + n)

    def release(self, handles: range) -> None:
        """These handles may be used again."""
        self._used.difference_update(handles)

    def send(self, message: ToEngine) -> None:
        """To the engine, without waiting."""
        self._requests.send(self._encode(message), zmq.NOBLOCK)

    def submit(self, request: AddRequest, prompt: list[int]) -> Generation:
        """Send a request with a handle of `new_handle`. ApiError 400 for one that cannot travel."""
        try:
            message = self._encode(request)
        except OverflowError:
            raise bad_request("a number of the request does not fit in 64 bits") from None
        generation = Generation(request, self.figures, self.abort)
        sampling = request.sampling
        self._processor.add(
            request.request_id, request.handle, sampling.n, None, prompt, sampling, request.arrival
        )
        self._alive[request.request_id] = generation
        self._used.update(generation.handles)
        self._queued[request.handle] = generation
        if request.timeout:
            self._deadlines[generation.request_id] = request.arrival + request.timeout + LATE
        self._requests.send(message, zmq.NOBLOCK)
        return generation

    def abort(self, generation: Generation) -> None:
        """Tell engine and processor to forget a generation."""
        if self._alive.get(generation.request_id) is not generation:
            return
        self._forget(generation)
        handles = self._processor.abort(generation.request_id)
        self.figures.finished[("abort",)] += len(handles)
        generation.reasons += ["abort"] * bool(handles)
        if handles and self.last_words is None:
            self._requests.send(self._encode(Abort(handles)), zmq.NOBLOCK)

    def watch(self) -> AsyncGenerator[View | None]:
        """Views of the engine while they are iterated; None after a second without one."""
        return self.views.watch()

    def _ask_views(self, watch: Watch) -> None:
        if self.last_words is None and not self._requests.closed:
            self.send(watch)

    def fail_all(self, error: ApiError) -> None:
        """End every generation with an error, and the engine's work on it."""
        for generation in tuple(self._alive.values()):
            generation.fail(error)
            self.abort(generation)
        self.encodings.fail_all(error)

    def _forget(self, generation: Generation) -> None:
        del self._alive[generation.request_id]
        self._used.difference_update(generation.handles)
        self._queued.pop(generation.handles[0], None)
        self._deadlines.pop(generation.request_id, None)

    def _read(self) -> None:
        # The descriptor signals edges: everything must be read, or the next signal never comes. The
        # streams get their turn in between, or an engine faster than we are would starve them.
        until = time.monotonic() + TURN
        with contextlib.suppress(zmq.Again):
            while True:
                payload = self._outputs.recv(zmq.NOBLOCK)
                self._heard = time.monotonic()
                try:
                    self._take(self._decode(payload))
                except Exception:  # one bad output must not deafen the process
                    logger.exception("an output of the engine could not be used")
                if self._heard > until:
                    asyncio.get_running_loop().call_soon(self._read)
                    return

    def _take(self, message: FromEngine) -> None:
        if isinstance(message, Ready):
            self.ready = message
            self.settled.set()
        elif isinstance(message, Dead):
            self._die(message.message)
        elif isinstance(message, View):
            self.views.put(message)
        else:
            self._take_output(message)

    def _take_output(self, output: Output) -> None:
        if output.stats is not None:
            self.stats = output.stats
        for start in output.starts:
            if start.handle in self._queued:
                self._queued.pop(start.handle).queued = start.queued
                self.figures.queued.observe(start.queued)
        if output.encoded or output.finished:
            self.encodings.take(output)
        results, surplus = self._processor.process(output, self._heard)
        for result in results:
            generation = self._alive.get(result.request_id)
            if generation is not None:
                generation.put(result, self._heard)
                if result.error:
                    self.abort(generation)  # the other choices of the same request
                elif result.finished:
                    self._forget(generation)
        if surplus:  # the text ended (a stop string) before the tokens did
            self._requests.send(self._encode(Abort(surplus)), zmq.NOBLOCK)

    async def _keep_watch(self) -> None:
        while self.last_words is None:
            await asyncio.sleep(WATCH)
            self._read()
            self._end_late()
            ended = self._ended()
            if ended is not None:
                self._read()
                self._die(ended)

    def _end_late(self) -> None:
        """Give up what an engine that hangs did not end in time."""
        now = time.monotonic()
        for name in [name for name, due in self._deadlines.items() if now > due]:
            generation = self._alive[name]
            generation.fail(
                ApiError(
                    408,
                    f"the request ran into its own time limit of {generation.timeout:g} s",
                )
            )
            self.abort(generation)

    def _die(self, last_words: str) -> None:
        if self.last_words is None:
            self.last_words = last_words
            self.settled.set()
            self.fail_all(ApiError(500, f"the engine stopped: {last_words}"))
