"""A device that only sleeps, under the engine's real loop."""

import functools
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from octavo.bench.nothing import empty_parts
from octavo.engine.config import EngineConfig
from octavo.engine.core import EngineCore
from octavo.engine.grammar.compiler import Compiler
from octavo.engine.grammar.vocabulary import Vocabulary
from octavo.engine.harvest import Rows
from octavo.engine.host import Flight, Host, Launch, Limits
from octavo.engine.masks import Masks
from octavo.engine.messages import AddRequest
from octavo.engine.sampling_params import SamplingParams
from octavo.engine.sequence import Sequence
from octavo.engine.state import FINISHED, LIVE
from octavo.engine.step import taken_capacity
from octavo.engine.text.tokenizer import Tokenizer, load_tokenizer

PROMPT = 16
WARM_STEPS = 10


class SleepingDevice:
    """A stand-in for Device: sleeps where the forward pass would be, and keeps pages as one does.

    Passes follow each other on one timeline. A step is done when its pass is, or when its mask
    arrives, whichever is later.
    """

    compiles_after_ready = 0

    def __init__(self, limits: Limits, vocab: int, seconds: float) -> None:
        dims = limits.dims
        self.dims, self.seconds = dims, seconds
        self.masks = Masks(vocab)
        self.free = list(range(dims.groups[0].pages - 1, 0, -1))
        self.active = np.zeros(dims.slots, np.bool_)
        self.length = np.zeros(dims.slots, np.int32)
        self.limit = np.zeros(dims.slots, np.int32)
        self.done = 0.0  # when the last dispatched step is

    def begin(self, launch: Launch) -> None:
        draft, flight = launch.parts[0].draft, launch.flight
        self.active[draft.stops] = False
        for src, dst in draft.moves:
            for array in (self.active, self.length, self.limit):
                array[dst] = array[src]
            self.active[src] = False
        for pages in draft.returned:
            self.free += pages
        for one in draft.admissions:
            self.active[one.slot] = False
            self.length[one.slot], self.limit[one.slot] = one.length, one.limit
        if not launch.rows:
            return
        live = self.active[: launch.rows].copy()
        size = self.dims.page_size
        pages = [
            self.free.pop() for _ in np.flatnonzero(live & (self.length[: launch.rows] % size == 0))
        ]
        self.length[: launch.rows] += live
        for sequence, start, count, final in flight.chunks:
            slot = sequence.slot
            pages += [
                self.free.pop() for _ in range(-(-(start + count) // size) - -(-start // size))
            ]
            self.length[slot] = start + count
            self.active[slot] |= final
            live[slot] |= final
        taken = np.zeros(2 + taken_capacity(self.dims, launch.rows, launch.tokens), np.int32)
        taken[: 2 + len(pages)] = [len(self.free), len(pages), *pages]
        length = self.length[: launch.rows].copy()
        finished = live & (length + 1 >= self.limit[: launch.rows])
        self.active[: launch.rows] &= ~finished
        flags = live * LIVE + finished * FINISHED
        self.done = max(self.done, time.perf_counter()) + self.seconds
        flight.result = [flags.astype(np.int32), length, taken]

    def finish(self, launch: Launch, lanes: list[Host]) -> None:
        if not launch.rows:
            return
        mask = self.masks.build(lanes[0], launch.flight) if launch.masked else None
        self.done = max(self.done, time.perf_counter())
        launch.flight.result += [mask, self.done]

    def read(self, flight: Flight, *, behind: int) -> list[Rows] | None:
        if flight.result is None:
            return None
        flags, length, taken, mask, done = flight.result
        token = np.full(flight.rows, 100, np.int32) if mask is None else first_allowed(mask)
        time.sleep(max(0.0, done - time.perf_counter()))
        return [Rows(np.stack([flags, token, np.zeros_like(token), length]), taken)]

    def take_stuck(self) -> list[tuple[Sequence, str]]:
        return self.masks.take_stuck()

    def rebuild(self) -> None:
        raise NotImplementedError("a step failed, which this bench does not expect")

    def close(self) -> None:
        pass


def first_allowed(mask: np.ndarray) -> np.ndarray:
    """i32[R] a token that each row's mask u32[R, words] allows: the first beyond a third of it."""
    start = mask.shape[1] // 3
    turned = np.roll(mask, -start, axis=1)
    word = np.argmax(turned != 0, axis=1)
    value = turned[np.arange(len(mask)), word].astype(np.int64)
    bit = np.log2(value & -value).astype(np.int64)
    return (32 * ((word + start) % mask.shape[1]) + bit).astype(np.int32)


@functools.cache
def tokenizer_of(model: str) -> Tokenizer:
    return load_tokenizer(model)


def vocab_of(model: str) -> int:
    """Tokens of a model's vocabulary."""
    return tokenizer_of(model).vocab_size


@contextmanager
def engine(model: str, streams: int, steps: int, seconds: float) -> Iterator[EngineCore]:
    """An engine over a sleeping device, with grammars over this model's vocabulary."""
    config = EngineConfig(
        max_num_seqs=streams,
        max_model_len=PROMPT + steps + WARM_STEPS + 64,
        max_num_batched_tokens=max(128, PROMPT * streams),
        enable_prefix_caching=False,
    )
    core = EngineCore(config, parts=empty_parts(config))
    core.device.close()
    core.device = SleepingDevice(core.limits, vocab_of(model), seconds)  # type: ignore[assignment]
    core.grammars = Compiler(lambda: Vocabulary.of(tokenizer_of(model), vocab_of(model), []))
    try:
        yield core
    finally:
        core.close()


def begin(core: EngineCore, streams: int, steps: int, grammar: str) -> None:
    """Get every stream under way."""
    sampling = SamplingParams(temperature=0.0, max_tokens=steps + WARM_STEPS + 32, ignore_eos=True)
    prompt = np.arange(PROMPT, dtype=np.int32).tobytes()
    for handle in range(streams):
        core.add(AddRequest(handle, str(handle), prompt, sampling, grammar=grammar))
    while np.count_nonzero(core.host.decoding) < streams:
        core.turn()
    for _ in range(WARM_STEPS):
        core.turn()


def longest_step(core: EngineCore, streams: int, steps: int, grammar: str) -> float:
    """Seconds of the longest of `steps` steps of all streams but one, whose grammar compiles."""
    begin(core, streams - 1, steps, "")
    sampling = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)
    prompt = np.arange(PROMPT, dtype=np.int32).tobytes()
    if grammar:
        core.add(AddRequest(streams, str(streams), prompt, sampling, grammar=grammar))
    seconds = []
    for _ in range(steps):
        began = time.perf_counter()
        core.turn()
        seconds.append(time.perf_counter() - began)
    core.abort(range(streams + 1))
    core.drain()
    return max(seconds)


def seconds_per_step(core: EngineCore, streams: int, steps: int, grammar: str) -> float:
    """The mean of `steps` decode steps with every stream under way."""
    begin(core, streams, steps, grammar)
    first, began = core.host.counters.steps, time.perf_counter()
    while core.host.counters.steps < first + steps:
        core.turn()
    taken = (time.perf_counter() - began) / steps
    assert np.count_nonzero(core.host.decoding) == streams, "a stream ended while it was measured"
    core.abort(range(streams))
    core.drain()
    return taken
