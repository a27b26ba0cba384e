"""The device side of the run loop: dispatches launches, and holds the state between steps."""

import logging
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from octavo.engine.assemble import Parts
from octavo.engine.build import Build
from octavo.engine.compiles import WATCH
from octavo.engine.harvest import Rows
from octavo.engine.host import Flight, Host, Launch, Limits
from octavo.engine.masks import Masks
from octavo.engine.plan import CHUNKS, Packer
from octavo.engine.programs import forward_key
from octavo.engine.reader import Reader
from octavo.engine.sampling_params import MAX_LOGPROB_TOKEN_IDS
from octavo.engine.sequence import Sequence

logger = logging.getLogger(__name__)


class Device:
    """Params, state and programs. `state` is the newest generation, whatever is in flight."""

    def __init__(
        self,
        parts: Parts,
        limits: Limits,
        reader: Reader,
        build: Build,
    ) -> None:
        self.limits = limits
        self.reader = reader
        self.params = parts.params
        self.head = parts.resolved.model.head(parts.params)
        self._close = parts.backend.close
        self.packer = Packer(limits.dims)
        self.programs = build.programs()
        self.put = self.programs.placement.put
        self.compile_seconds = build.seconds
        with WATCH.building():
            self.state = self.programs.empty()
            jax.block_until_ready(self.state)
        self._compiled = WATCH.unexpected
        mesh = parts.resolved.mesh
        lanes = 1 if mesh is None else mesh.shape["data"]
        self.masks = [Masks(limits.dims.vocab) for _ in range(lanes)]

    @property
    def compiles_after_ready(self) -> int:
        """Programs that were compiled while somebody waited for an answer."""
        return WATCH.unexpected - self._compiled

    def begin(self, launch: Launch) -> Any:
        """Edit the state and dispatch the forward pass."""
        vector, edits = None, launch.edits
        if launch.tokens or edits:
            vector = self.put(stack([self.packer.pack(part.draft) for part in launch.parts]))
        if edits:
            slots, pages = self.programs.edit(self.state.slots, self.state.pages, vector)
            self.state = replace(self.state, slots=slots, pages=pages)
        if not launch.rows:
            return None
        if launch.several:
            several = self.programs.several[launch.rows, launch.greedy]
            self.state, *launch.flight.result = several(self.params, self.state)
            return None
        key = forward_key(launch.rows, launch.tokens, launch.context)
        arguments = (vector,) if launch.tokens else ()
        self.state, passed, taken = self.programs.forward[key](self.params, self.state, *arguments)
        launch.flight.result = (taken,)
        return passed

    def finish(self, launch: Launch, passed: Any, lanes: list[Host]) -> None:
        """Dispatch sampling, and start the copies to the host."""
        flight, flights = launch.flight, [part.flight for part in launch.parts]
        if passed is not None:
            if launch.scored:
                targets = self.put(stack(list(map(self._targets, lanes, flights))))
                named = self.put(stack(list(map(named_of_chunks, flights))))
                score = self.programs.score[launch.tokens]
                flight.scores = score(self.head, passed.chunk_hidden, targets, named)
            passed = replace(passed, chunk_hidden=None)
            arguments = (self.head, self.state.slots, passed)
            if launch.rich or launch.masked:
                mask = self.put(stack(list(map(Masks.build, self.masks, lanes, flights))))
            if launch.rich:
                named = self.put(stack(list(map(named_of_rows, flights))))
                rich = self.programs.rich[launch.rows]
                slots, packed, flight.rich = rich(*arguments, mask, named)
            elif launch.masked:
                slots, packed = self.programs.masked[launch.rows](*arguments, mask)
            else:
                choices = self.programs.greedy if launch.greedy else self.programs.sample
                sample = choices[launch.rows]
                slots, packed = sample(*arguments)
            self.state = replace(self.state, slots=slots)
            flight.result = (packed, *flight.result)
        self.reader.expect((flight.result, flight.rich, flight.scores))

    def take_stuck(self) -> list[tuple[Sequence, str]]:
        """Sequences for which no token is left to choose, and why."""
        return [each for masks in self.masks for each in masks.take_stuck()]

    def _targets(self, host: Host, flight: Flight) -> np.ndarray:
        """i32[2, T] the token that follows each chunk token, and its chunk."""
        targets = np.zeros((2, flight.tokens), np.int32)
        at = 0
        for chunk, (sequence, start, count, _) in enumerate(flight.chunks):
            following = host.tokens[sequence.slot, start + 1 : start + 1 + count]
            targets[0, at : at + len(following)] = following
            targets[1, at : at + count] = chunk
            at += count
        return targets

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
        self.state = None
        self.state = self.programs.empty()

    def close(self) -> None:
        """Free the device memory now, not when the collector comes around."""
        for leaf in jax.tree.leaves((self.state, self.params)):
            if not leaf.is_deleted():
                leaf.delete()
        self.state = self.params = self.head = None
        self.programs = None  # type: ignore[assignment]
        self._close()


def stack(lanes: list[np.ndarray]) -> np.ndarray:
    """[lanes, ...]; without a copy where there is one."""
    return lanes[0][None] if len(lanes) == 1 else np.stack(lanes)


def named_of_rows(flight: Flight) -> np.ndarray:
    """i32[R, M] the tokens whose log probabilities each row's request named; zeros elsewhere."""
    named = np.zeros((flight.rows, MAX_LOGPROB_TOKEN_IDS), np.int32)
    for row, sequence in enumerate(flight.sequences):
        if sequence is not None and sequence.request.sampling.logprob_token_ids:
            ids = sequence.request.sampling.logprob_token_ids
            named[row, : len(ids)] = ids
    return named


def named_of_chunks(flight: Flight) -> np.ndarray:
    """i32[CHUNKS, M] the same for the prompts that run in this step."""
    named = np.zeros((CHUNKS, MAX_LOGPROB_TOKEN_IDS), np.int32)
    for chunk, (sequence, *_) in enumerate(flight.chunks):
        ids = sequence.request.sampling.prompt_logprob_token_ids or ()
        named[chunk, : len(ids)] = ids
    return named
