"""The device side of the run loop: dispatches launches as orders, and reads what they leave."""

from collections.abc import Callable, Iterable

import numpy as np

from octavo.engine.assemble import Parts
from octavo.engine.build import Build
from octavo.engine.compiles import WATCH
from octavo.engine.dispatch import Dispatcher, Results
from octavo.engine.harvest import Rows
from octavo.engine.host import Flight, Host, Launch, Limits
from octavo.engine.masks import Masks
from octavo.engine.orders import FORWARD, GREEDY, MASKED, RICH, SAMPLE, SEVERAL, Order
from octavo.engine.plan import Packer
from octavo.engine.reader import Reader
from octavo.engine.sampling_params import MAX_LOGPROB_TOKEN_IDS
from octavo.engine.sequence import Sequence


class Device(Dispatcher):
    """The leader's dispatcher: makes orders of launches, and reads what they leave."""

    def __init__(
        self,
        parts: Parts,
        limits: Limits,
        reader: Reader,
        build: Build,
        tell: Callable[[Order], None] | None = None,
    ) -> None:
        """`tell` sends every order to the other hosts, before it runs here."""
        super().__init__(parts.params, build.programs())
        self.limits = limits
        self.reader = reader
        self.packer = Packer(limits.dims)
        self.compile_seconds = build.seconds
        self._tell = tell
        self._step = 0
        self._compiled = WATCH.unexpected
        self.masks = [Masks(limits.dims.vocab) for _ in range(parts.resolved.lanes)]

    @property
    def compiles_after_ready(self) -> int:
        """Programs that were compiled while somebody waited for an answer."""
        return WATCH.unexpected - self._compiled

    def _order(self, order: Order) -> Results:
        if self._tell is not None:  # first: a program may wait for the other hosts
            self._step += 1
            order.step = self._step
            self._tell(order)
        return self.run(order)

    def begin(self, launch: Launch) -> None:
        """Edit the state and dispatch the forward pass, and sampling where it needs no more."""
        edits, flight = launch.edits, launch.flight
        order = Order(0, rows=launch.rows, tokens=launch.tokens, context=launch.context, edit=edits)
        if launch.tokens or edits:
            order.plan = joined(self.packer.pack(part.draft) for part in launch.parts)
        if launch.rows:
            order.forward = SEVERAL if launch.several else FORWARD
            if not _waits(launch):
                order.sampling = GREEDY if launch.greedy else SAMPLE
        done = self._order(order)
        if launch.rows:
            flight.result = (done.packed, done.taken)

    def finish(self, launch: Launch, lanes: list[Host]) -> None:
        """Dispatch what `begin` could not, and start the copies to the host."""
        flight, flights = launch.flight, [part.flight for part in launch.parts]
        if launch.rows and _waits(launch):
            order = Order(0, rows=launch.rows, tokens=launch.tokens)
            if launch.scored:
                order.scored = True
                order.targets = joined(map(targets_of, lanes, flights))
                order.named_chunks = joined(
                    named_of_chunks(flight, self.packer.dims.chunks) for flight in flights
                )
            if launch.rich or launch.masked:
                order.sampling = RICH if launch.rich else MASKED
                order.mask = joined(map(Masks.build, self.masks, lanes, flights))
            else:
                order.sampling = GREEDY if launch.greedy else SAMPLE
            if launch.rich:
                order.named_rows = joined(map(named_of_rows, flights))
            done = self._order(order)
            flight.result = (done.packed, flight.result[1])
            flight.rich, flight.scores = done.rich, done.scores
        self.reader.expect((flight.result, flight.rich, flight.scores))

    def take_stuck(self) -> list[tuple[Sequence, str]]:
        """Sequences for which no token is left to choose, and why."""
        return [each for masks in self.masks for each in masks.take_stuck()]

    def read(self, flight: Flight, *, behind: int) -> list[Rows] | None:
        """The results of a step by lane, on the host; None where it only edited.

        flight: the first lane's.
        """
        if flight.parts > 1:
            return self._read_part(flight, behind)
        if flight.result is None:
            return None
        arrays = (flight.result, flight.rich, flight.scores)
        (packed, taken), rich, scores = self.reader.read(arrays, behind=behind)
        return [
            Rows(
                packed[lane],
                taken[lane],
                tuple(a[lane] for a in rich) if rich else (),
                tuple(a[lane] for a in scores) if scores else (),
            )
            for lane in range(len(packed))
        ]

    def _read_part(self, flight: Flight, behind: int) -> list[Rows]:
        """One step of a program that held several: the first brings the results of all."""
        if flight.leader is None:
            flight.result = self.reader.read(flight.result, behind=behind)
        packed, taken = (flight.leader or flight).result
        part = flight.part
        return [Rows(packed[lane, part], taken[lane, part]) for lane in range(len(packed))]

    def rebuild(self) -> None:
        """An empty state in place of one that a failed step took with it."""
        self._order(Order(0, empty=True))


def _waits(launch: Launch) -> bool:
    """Whether sampling needs what the host builds while the forward pass runs."""
    return launch.rich or launch.masked or launch.scored


def joined(lanes: Iterable[np.ndarray]) -> bytes:
    """One array of every lane, one behind another."""
    return b"".join(array.tobytes() for array in lanes)


def targets_of(host: Host, flight: Flight) -> np.ndarray:
    """i32[2, T] the token that follows each chunk token, and its chunk."""
    targets = np.zeros((2, flight.tokens), np.int32)
    at = 0
    for chunk, (sequence, start, count, _) in enumerate(flight.chunks):
        following = host.tokens[sequence.slot, start + 1 : start + 1 + count]
        targets[0, at : at + len(following)] = following
        targets[1, at : at + count] = chunk
        at += count
    return targets


def named_of_rows(flight: Flight) -> np.ndarray:
    """i32[R, M] the tokens whose log probabilities each row's request named; zeros elsewhere."""
    named = np.zeros((flight.rows, MAX_LOGPROB_TOKEN_IDS), np.int32)
    for row, sequence in enumerate(flight.sequences):
        if sequence is not None and sequence.request.sampling.logprob_token_ids:
            ids = sequence.request.sampling.logprob_token_ids
            named[row, : len(ids)] = ids
    return named


def named_of_chunks(flight: Flight, chunks: int) -> np.ndarray:
    """i32[C, M] the same for the prompts that run in this step."""
    named = np.zeros((chunks, MAX_LOGPROB_TOKEN_IDS), np.int32)
    for chunk, (sequence, *_) in enumerate(flight.chunks):
        ids = sequence.request.sampling.prompt_logprob_token_ids or ()
        named[chunk, : len(ids)] = ids
    return named
