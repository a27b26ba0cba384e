"""Runs orders: params, programs and the newest generation of the state.

The same class runs on every host of a mesh. Each dispatches the same programs with the same
arguments in the same order, so that their collectives meet; only the leader reads results.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from octavo.engine.compiles import WATCH
from octavo.engine.functions import forward_key
from octavo.engine.grammar.guide import mask_words
from octavo.engine.orders import FORWARD, GREEDY, MASKED, NO_SAMPLING, RICH, SAMPLE, SEVERAL, Order
from octavo.engine.programs import Programs
from octavo.engine.sampling_params import MAX_LOGPROB_TOKEN_IDS


@dataclass
class Results:
    """Device arrays that an order left to be read; None where it ran no such program."""

    packed: Any = None
    taken: Any = None
    rich: Any = None
    scores: Any = None


class Dispatcher:
    """Params, state and programs. `state` is the newest generation, whatever is in flight."""

    def __init__(self, params: Any, programs: Programs) -> None:
        self.params: Any = params
        self.head: Any = programs.machine.model.head(params)
        self.programs = programs
        self._passed: Any = None  # what the last forward pass left for sampling
        with WATCH.building():
            self.state: Any = programs.empty()
            jax.block_until_ready(self.state)

    def run(self, order: Order) -> Results:
        """Dispatch the order's programs; nothing is waited for."""
        done, programs = Results(), self.programs
        if order.empty:
            self.state = self._passed = None
            self.state = programs.empty()
            return done
        vector = self._put(order.plan, np.int32, -1) if order.plan else None
        if order.edit:
            slots, pages = programs.edit(self.state.slots, self.state.pages, vector)
            self.state = replace(self.state, slots=slots, pages=pages)
        if order.forward == SEVERAL:
            several = programs.several[order.rows, order.sampling == GREEDY]
            self.state, done.packed, done.taken = several(self.params, self.state)
            return done
        whole = None if order.tokens else programs.whole.get((order.rows, order.sampling == GREEDY))
        if whole and order.forward == FORWARD and order.sampling in (GREEDY, SAMPLE):
            self.state, done.packed, done.taken = whole(self.params, self.state)
            return done
        if order.forward == FORWARD:
            arguments = (vector,) if order.tokens else ()
            forward = programs.forward[forward_key(order.rows, order.tokens, order.context)]
            self.state, self._passed, done.taken = forward(self.params, self.state, *arguments)
        if order.scored:
            dims = programs.machine.dims
            targets = self._put(order.targets, np.int32, 2, order.tokens)
            named = self._put(order.named_chunks, np.int32, dims.chunks, MAX_LOGPROB_TOKEN_IDS)
            score = programs.score[order.tokens]
            done.scores = score(self.head, self._passed.chunk_hidden, targets, named)
        if order.sampling != NO_SAMPLING:
            self._sample(order, done)
        return done

    def _sample(self, order: Order, done: Results) -> None:
        programs, rows = self.programs, order.rows
        passed = replace(self._passed, chunk_hidden=None)
        self._passed = None
        arguments: tuple[Any, ...] = (self.head, self.state.slots, passed)
        if order.sampling >= MASKED:
            words = mask_words(programs.machine.dims.vocab)
            arguments += (self._put(order.mask, np.uint32, rows, words),)
        if order.sampling == RICH:
            named = self._put(order.named_rows, np.int32, rows, MAX_LOGPROB_TOKEN_IDS)
            slots, done.packed, done.rich = programs.rich[rows](*arguments, named)
        elif order.sampling == MASKED:
            slots, done.packed = programs.masked[rows](*arguments)
        else:
            choices = programs.greedy if order.sampling == GREEDY else programs.sample
            slots, done.packed = choices[rows](*arguments)
        self.state = replace(self.state, slots=slots)

    def _put(self, data: bytes, dtype: Any, *shape: int) -> jax.Array:
        """Bytes of one array per data shard, to the device."""
        place = self.programs.placement
        return place.put(np.frombuffer(data, dtype).reshape(place.shards, *shape))

    def close(self) -> None:
        """Free the device memory now, not when the collector comes around."""
        for leaf in jax.tree.leaves((self.state, self.params)):
            if not leaf.is_deleted():
                leaf.delete()
        self.state = self.params = self.head = self._passed = None
        close = self.programs.machine.backend.close
        self.programs = None  # type: ignore[assignment]
        close()
