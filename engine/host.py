"""What the host knows of the engine: mirrors of the slots, the queue, the pools, the flights.

A mesh with several data shards has a Host for each: a lane, with slots and pages of its own. Lanes
step together: every lane has a flight for every step that was dispatched, in the same order.

The mirrors come in two ages: `sent` lengths are those after every dispatched step, `known` ones
those of the last harvested step. Host code: no jax, no clock.
"""

import heapq
from bisect import bisect_left
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from octavo.engine.messages import ITERATION_TOKENS
from octavo.engine.plan import Draft
from octavo.engine.pool import Pool
from octavo.engine.sequence import Phase, Sequence
from octavo.engine.state import STOP_IDS, Dims


@dataclass(frozen=True)
class Limits:
    """What a schedule must respect; static."""

    dims: Dims
    row_buckets: tuple[int, ...]  # ascending, the last is B
    token_buckets: tuple[int, ...]  # ascending, the last is the budget
    depth: int  # steps in flight
    prefix_caching: bool
    by_priority: bool
    apart: bool = False  # prefill and decode cannot share a program: they take turns
    steps: int = 1  # decode steps that one program may hold; see octavo.engine.several
    several_rows: tuple[int, ...] = ()  # the row buckets that have such programs
    context_buckets: tuple[int, ...] = ()  # pages that a program looks at; empty: all it could


@dataclass(eq=False, slots=True)
class Flight:
    """A dispatched step, with all that its harvest needs to know."""

    rows: int  # R; 0 when only an edit was dispatched
    serials: np.ndarray  # i64[R] who was in which row
    sequences: list[Sequence | None]  # [R] the same
    decoding: np.ndarray  # bool[R] rows that decode, as far as the host knew
    chunks: list[tuple[Sequence, int, int, bool]]  # sequence, start, count, final
    takes: list[int]  # per group: the most pages this step takes
    stops: list[Sequence]
    windows: list[tuple[int, Sequence, int]]  # group, sequence, first
    tokens: int = 0  # T
    # Device arrays of all lanes, at the first one's flight; see octavo.engine.reader.
    result: Any = None
    rich: Any = None
    scores: Any = None
    # Steps of one program are flights of their own, which share the result of the first.
    leader: Any = None  # Flight, for all but the first
    part: int = 0  # which of the program's steps this is
    parts: int = 1


@dataclass(eq=False, slots=True)
class Part:
    """One lane's share of a step."""

    draft: Draft
    flight: Flight
    followers: list[Flight] = field(default_factory=list)  # more decode steps in the same program


@dataclass(eq=False, slots=True)
class Launch:
    """What `schedule` decided: a step to dispatch, one program for all lanes."""

    parts: list[Part]  # by lane
    rows: int
    tokens: int  # T bucket; 0 is a pure decode
    rich: bool = False  # log probabilities beside the tokens
    masked: bool = False  # the mask needs every token before this step
    scored: bool = False  # prompt log probabilities
    greedy: bool = False  # every row takes the likeliest token: the shortest program
    context: int = 0  # pages per slot that the program looks at; 0 is all

    @property
    def edits(self) -> bool:
        """Whether the state must be edited before the forward pass."""
        return any(part.draft.edits() for part in self.parts)

    @property
    def flight(self) -> Flight:
        """The first lane's, which has the results of all."""
        return self.parts[0].flight

    @property
    def several(self) -> bool:
        """Whether the program holds more than this one step."""
        return bool(self.parts[0].followers)


@dataclass
class Counters:
    """Totals since start."""

    preemptions: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    steps: int = 0
    waits: int = 0  # times nothing could be dispatched until a harvest gave pages back
    iterations: list[int] = field(default_factory=lambda: [0] * (len(ITERATION_TOKENS) + 1))
    iteration_tokens: int = 0

    def count_iteration(self, tokens: int) -> None:
        """One step was harvested that worked on so many tokens."""
        self.iterations[bisect_left(ITERATION_TOKENS, tokens)] += 1
        self.iteration_tokens += tokens


class Host:
    """The mutable host state of one lane."""

    def __init__(self, limits: Limits) -> None:
        dims = limits.dims
        self.limits = limits
        self.pools = [Pool(dims, group) for group in dims.groups]
        self.occupant: list[Sequence | None] = [None] * dims.slots
        self.serial = np.full(dims.slots, -1, np.int64)
        self.handle = np.zeros(dims.slots, np.uint32)
        self.tokens = np.zeros((dims.slots, dims.max_len), np.int32)
        self.known = np.zeros(dims.slots, np.int32)  # tokens known: prompt and harvested output
        self.sent = np.zeros(dims.slots, np.int32)  # cached length after every dispatched step
        self.ran = np.zeros(dims.slots, np.int32)  # cached length as harvested
        self.limit = np.zeros(dims.slots, np.int32)
        self.indexed = np.zeros(dims.slots, np.int32)  # full pages whose names were given
        self.decoding = np.zeros(dims.slots, np.bool_)  # decodes in the next step, as far as known
        self.muted = np.zeros(dims.slots, np.bool_)  # aborted: tokens are dropped
        self.choosy = np.zeros(dims.slots, np.bool_)  # wants more than the likeliest token
        self.special = np.zeros(dims.slots, np.bool_)  # wants log probabilities or a mask
        self.watched = np.zeros(dims.slots, np.bool_)  # has stop tokens that only the host checks
        self.free_slots = list(range(dims.slots))  # heap: the lowest first
        self.prefilling: list[Sequence] = []  # in slots, in order
        self.stopping: list[Sequence] = []  # their stop is in no plan yet
        self.stale: list[int] = []  # finished slots whose row the device still shows
        self.queue: list[tuple[int, int, Sequence]] = []  # heap of the waiting
        self.compiling: set[Sequence] = set()  # in no queue until their grammar is built
        self.gone = 0  # entries of the queue that wait no more
        self.live: dict[int, Sequence] = {}  # by handle
        self.children: dict[int, list[Sequence]] = {}  # by the parent's serial, held back
        self.flights: deque[Flight] = deque()
        self.counters = Counters()
        self.ran_prompts = False  # the last step ran prompts

    @property
    def in_flight(self) -> int:
        """Programs that are out, however many steps they hold."""
        return sum(flight.part == 0 for flight in self.flights)

    # --- the queue

    @property
    def waiting(self) -> int:
        """Sequences in no slot."""
        return len(self.queue) - self.gone + self.deferred

    @property
    def deferred(self) -> int:
        """Of the waiting, those whose grammar compiles, or whose first choice runs its prompt."""
        return len(self.compiling) + sum(len(children) for children in self.children.values())

    @property
    def running(self) -> int:
        """Sequences in a slot."""
        return self.limits.dims.slots - len(self.free_slots)

    def enqueue(self, sequence: Sequence) -> None:
        """Wait for a slot; a preempted sequence keeps its place by its arrival."""
        sequence.phase = Phase.WAITING
        priority = sequence.request.priority if self.limits.by_priority else 0
        heapq.heappush(self.queue, (priority, sequence.serial, sequence))

    def peek(self) -> Sequence | None:
        """The first of the waiting."""
        while self.queue and self.queue[0][2].phase is not Phase.WAITING:
            heapq.heappop(self.queue)
            self.gone -= 1
        return self.queue[0][2] if self.queue else None

    def pop(self) -> None:
        """Take the first of the waiting out."""
        heapq.heappop(self.queue)

    # --- slots

    def occupy(self, sequence: Sequence, slot: int) -> None:
        """Put a sequence into a free slot; the device follows with the same plan."""
        sequence.slot, sequence.phase = slot, Phase.RUNNING
        count = len(sequence.tokens)
        self.occupant[slot] = sequence
        self.serial[slot] = sequence.serial
        self.handle[slot] = sequence.handle
        self.tokens[slot, :count] = sequence.tokens
        self.known[slot] = count
        self.limit[slot] = sequence.limit
        self.decoding[slot] = self.muted[slot] = False
        self.choosy[slot] = sequence.choosy
        self.special[slot] = sequence.wants_logprobs or sequence.masked
        self.watched[slot] = len(sequence.stop_ids) > STOP_IDS

    def vacate(self, slot: int) -> None:
        """The slot and its pages are the host's again."""
        sequence = self.occupant[slot]
        assert sequence is not None, f"{slot=} is empty"
        sequence.tokens = self.tokens[slot, : self.known[slot]].copy()
        sequence.slot = -1
        for pool in self.pools:
            pool.release(slot)
        self.occupant[slot] = None
        self.serial[slot] = -1
        self.decoding[slot] = self.muted[slot] = self.special[slot] = False
        self.known[slot] = self.sent[slot] = self.ran[slot] = self.indexed[slot] = 0
        heapq.heappush(self.free_slots, slot)

    def move(self, src: int, dst: int) -> None:
        """Row dst, free, becomes row src; the device follows with the same plan."""
        sequence = self.occupant[src]
        assert sequence is not None and self.occupant[dst] is None, f"{src=} {dst=}"
        self.occupant[dst], self.occupant[src] = sequence, None
        sequence.slot = dst
        for array in (
            self.serial,
            self.handle,
            self.tokens,
            self.known,
            self.sent,
            self.ran,
            self.limit,
            self.indexed,
            self.decoding,
            self.muted,
            self.choosy,
            self.special,
            self.watched,
        ):
            array[dst] = array[src]
        self.serial[src], self.decoding[src] = -1, False
        for pool in self.pools:
            pool.move(src, dst)
        self.free_slots.remove(dst)
        heapq.heapify(self.free_slots)
        heapq.heappush(self.free_slots, src)
