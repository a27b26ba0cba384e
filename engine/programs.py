"""The compiled programs: all of them before ready, in parallel, from a persistent cache.

    edit                    1 forward (R, T)          the decode buckets of R with T = 0, and the
    prompt buckets of T at full R sample (R)              plain, and rich (masks and log
    probabilities) score (T)               log probabilities of prompt tokens step (R, T)
    forward and sample in one program, where the backend prefers that

Every leaf of the state has a leading `data` axis, which a mesh will shard; a program sees one
shard.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp

from octavo.engine import step
from octavo.engine.compiles import WATCH
from octavo.engine.grammar.guide import mask_words
from octavo.engine.host import Limits
from octavo.engine.plan import CHUNKS, plan_size
from octavo.engine.sampling_params import MAX_LOGPROB_TOKEN_IDS
from octavo.engine.state import EngineState, empty_pages, empty_slots

Progress = Callable[[str, int, int], None]  # what, done, total


def one_shard(tree: Any) -> Any:
    """Drop the leading data axis of size 1."""
    return jax.tree.map(lambda a: a.reshape(a.shape[1:]), tree)


def as_shard(tree: Any) -> Any:
    """Add the leading data axis."""
    return jax.tree.map(lambda a: a.reshape((1, *a.shape)), tree)


def new_state(machine: step.Machine, init_kv: Callable[[], Any]) -> EngineState:
    """An empty state, one data shard; traceable."""
    dims = machine.dims
    pages = tuple(empty_pages(dims, group) for group in dims.groups)
    return as_shard(EngineState(slots=empty_slots(dims), pages=pages, kv=init_kv()))


@dataclass
class Programs:
    """Compiled programs by bucket. Call them with device arrays only."""

    machine: step.Machine
    limits: Limits
    max_logprobs: int
    edit: Any = None
    empty: Any = None
    forward: dict[tuple[int, int], Any] = field(default_factory=dict)
    greedy: dict[int, Any] = field(default_factory=dict)
    sample: dict[int, Any] = field(default_factory=dict)
    masked: dict[int, Any] = field(default_factory=dict)
    rich: dict[int, Any] = field(default_factory=dict)
    score: dict[int, Any] = field(default_factory=dict)

    def shapes(self) -> list[tuple[int, int]]:
        """The (R, T) of every forward pass."""
        rows, tokens = self.limits.row_buckets, self.limits.token_buckets
        return [(r, 0) for r in rows] + [(rows[-1], t) for t in tokens]

    def compile(
        self, params: Any, init_kv: Callable[[], Any], progress: Progress | None = None
    ) -> None:
        """Compile everything. params: arrays or ShapeDtypeStructs."""
        state = jax.eval_shape(lambda: new_state(self.machine, init_kv))
        jobs = self._jobs(jax.tree.map(_abstract, params), state, init_kv)
        options: Any = dict(self.machine.backend.compiler_options) or None
        done = 0
        with WATCH.building(), ThreadPoolExecutor(os.cpu_count() or 1) as threads:
            # Tracing holds the interpreter, compiling does not: trace here, compile there.
            futures = []
            for name, place, function, arguments, donate in jobs:
                jitted = jax.jit(function, donate_argnums=donate)
                lowered = jitted.lower(*arguments)
                work = threads.submit(lowered.compile, compiler_options=options)
                futures.append((name, place, work))
            for name, place, work in futures:
                place(work.result())
                done += 1
                if progress is not None:
                    progress(name, done, len(jobs))

    def _jobs(
        self, params: Any, state: Any, init_kv: Callable[[], Any]
    ) -> list[tuple[str, Callable[[Any], None], Any, tuple[Any, ...], tuple[int, ...]]]:
        """(name, where the program goes, function, abstract arguments, donated arguments)."""
        machine, dims = self.machine, self.machine.dims
        vector = jax.ShapeDtypeStruct((1, plan_size(dims)), jnp.int32)
        head = machine.model.head(params)
        jobs: list[Any] = [
            ("edit", self._set("edit"), _edit(machine), (state.slots, state.pages, vector), (0, 1)),
            ("empty", self._set("empty"), lambda: new_state(machine, init_kv), (), ()),
        ]
        # One function a shape: jax traces it once, for its result's shape here and to compile it.
        forwards = {shape: _forward(machine, *shape) for shape in self.shapes()}
        # The slowest first, so that they do not end up alone at the end.
        for rows, tokens in sorted(self.shapes(), reverse=True):
            function = forwards[rows, tokens]
            arguments = (params, state, vector) if tokens else (params, state)
            name = f"forward {rows} rows + {tokens} tokens"
            jobs.append((name, self._put(self.forward, (rows, tokens)), function, arguments, (1,)))
        for rows, tokens in self.shapes():
            arguments = (params, state, vector) if tokens else (params, state)
            passed = jax.eval_shape(forwards[rows, tokens], *arguments)[1]
            if tokens and tokens not in self.score:
                hidden = passed.chunk_hidden
                targets = jax.ShapeDtypeStruct((1, 2, tokens), jnp.int32)
                named = jax.ShapeDtypeStruct((1, CHUNKS, MAX_LOGPROB_TOKEN_IDS), jnp.int32)
                function = _score(machine, self._most_logprobs())
                place = self._put(self.score, tokens)
                scored = (head, hidden, targets, named)
                jobs.append((f"score {tokens} tokens", place, function, scored, ()))
            elif not tokens:
                jobs += self._sample_jobs(head, state.slots, passed, rows)
        return jobs

    def _sample_jobs(self, head: Any, slots: Any, passed: Any, rows: int) -> list[Any]:
        """Sampling sees the same rows whether or not there were chunk tokens beside them."""
        machine = self.machine
        rows_only = replace(passed, chunk_hidden=None)
        mask = jax.ShapeDtypeStruct((1, rows, mask_words(machine.dims.vocab)), jnp.uint32)
        named = jax.ShapeDtypeStruct((1, rows, MAX_LOGPROB_TOKEN_IDS), jnp.int32)
        rich = _rich(machine, self._most_logprobs())
        masked = _masked(machine)
        plain = (head, slots, rows_only)
        return [
            (f"greedy {rows} rows", self._put(self.greedy, rows), _greedy(machine), plain, (1,)),
            (f"sample {rows} rows", self._put(self.sample, rows), _sample(machine), plain, (1,)),
            (f"masked {rows} rows", self._put(self.masked, rows), masked, (*plain, mask), (1,)),
            (f"rich {rows} rows", self._put(self.rich, rows), rich, (*plain, mask, named), (1,)),
        ]

    def _most_logprobs(self) -> int:
        vocab = self.machine.dims.vocab
        return vocab if self.max_logprobs < 0 else max(1, min(self.max_logprobs, vocab))

    def _set(self, name: str) -> Callable[[Any], None]:
        return lambda program: setattr(self, name, program)

    def _put(self, where: dict[Any, Any], key: Any) -> Callable[[Any], None]:
        return lambda program: where.__setitem__(key, program)

    def workspace(self) -> int:
        """The most temporary memory any program needs, in bytes."""
        every = [
            self.edit,
            *self.forward.values(),
            *self.greedy.values(),
            *self.sample.values(),
            *self.masked.values(),
            *self.rich.values(),
        ]
        every += [*self.score.values()]
        sizes = [p.memory_analysis() for p in every if p is not None]
        return max((s.temp_size_in_bytes for s in sizes if s is not None), default=0)


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def _edit(machine: step.Machine) -> Any:
    def edit(slots: Any, pages: Any, vector: jax.Array) -> Any:
        return as_shard(step.edit(machine, one_shard(slots), one_shard(pages), vector[0]))

    return edit


def _forward(machine: step.Machine, rows: int, tokens: int) -> Any:
    def forward(params: Any, state: Any, vector: jax.Array | None = None) -> Any:
        plan = None if vector is None else vector[0]
        out = step.forward(machine, params, one_shard(state), plan, rows=rows, tokens=tokens)
        return as_shard(out)

    return forward


def _greedy(machine: step.Machine) -> Any:
    def greedy(head: Any, slots: Any, passed: Any) -> Any:
        after, packed, _ = step.sample(
            machine, head, one_shard(slots), one_shard(passed), greedy=True
        )
        return as_shard((after, packed))

    return greedy


def _sample(machine: step.Machine) -> Any:
    def sample(head: Any, slots: Any, passed: Any) -> Any:
        after, packed, _ = step.sample(machine, head, one_shard(slots), one_shard(passed))
        return as_shard((after, packed))

    return sample


def _masked(machine: step.Machine) -> Any:
    def masked(head: Any, slots: Any, passed: Any, mask: jax.Array) -> Any:
        after, packed, _ = step.sample(machine, head, one_shard(slots), one_shard(passed), mask[0])
        return as_shard((after, packed))

    return masked


def _rich(machine: step.Machine, logprobs: int) -> Any:
    def rich(head: Any, slots: Any, passed: Any, mask: jax.Array, named: jax.Array) -> Any:
        rows = (one_shard(slots), one_shard(passed), mask[0], named[0])
        return as_shard(step.sample(machine, head, *rows, logprobs=logprobs))

    return rich


def _score(machine: step.Machine, logprobs: int) -> Any:
    def score(head: Any, hidden: jax.Array, targets: jax.Array, named: jax.Array) -> Any:
        parts = (hidden[0], targets[0], named[0])
        return as_shard(step.score(machine, head, *parts, logprobs=logprobs))

    return score
