"""The compiled programs: all of them before ready, in parallel, from a persistent cache.

    edit             1
    forward (R, T)   the decode buckets of R with T = 0, and the prompt buckets of T at full R
    sample (R)       greedy, plain, and rich (masks and log probabilities)
    score (T)        log probabilities of prompt tokens
    several (R)      a few steps of forward and sample, greedy and plain, for models so small that
                     the host is what a step waits for

Every leaf of the state has a leading `data` axis, which a mesh will shard; a program sees one
shard.
"""

import os
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from threading import Event
from typing import Any

import jax
import jax.numpy as jnp

from octavo.engine import step
from octavo.engine.compiles import WATCH
from octavo.engine.grammar.guide import mask_words
from octavo.engine.host import Limits
from octavo.engine.job import Job, forward_key, shapes_of
from octavo.engine.mesh import ROWS, STATE, Placement
from octavo.engine.plan import CHUNKS, plan_size
from octavo.engine.sampling_params import MAX_LOGPROB_TOKEN_IDS
from octavo.engine.state import EngineState, empty_pages, empty_slots
from octavo.engine.store import Store

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
    folder: Path | None = None  # where they are kept between runs
    edit: Any = None
    empty: Any = None
    forward: dict[tuple[int, ...], Any] = field(default_factory=dict)  # by forward_key
    greedy: dict[int, Any] = field(default_factory=dict)
    sample: dict[int, Any] = field(default_factory=dict)
    masked: dict[int, Any] = field(default_factory=dict)
    rich: dict[int, Any] = field(default_factory=dict)
    score: dict[int, Any] = field(default_factory=dict)
    several: dict[tuple[int, bool], Any] = field(default_factory=dict)  # by (R, greedy)
    # By name: seconds to trace, which one thread does, and seconds of a thread to compile.
    builds: dict[str, tuple[float, float]] = field(default_factory=dict)
    found: int = 0  # programs that were kept from an earlier run
    made: dict[str, Any] = field(default_factory=dict)  # all of them by name
    # Where the state lies on devices that are not here: what is compiled for them is kept, not run.
    elsewhere: Any = None

    def contexts(self) -> tuple[int, ...]:
        """The pages that each forward pass has a program for; 0 is all."""
        return (*self.limits.context_buckets[:-1], 0)

    def shapes(self) -> list[tuple[int, int]]:
        """The (R, T) of every forward pass."""
        rows, tokens = self.limits.row_buckets, self.limits.token_buckets
        return [(r, 0) for r in rows] + [(rows[-1], t) for t in tokens]

    def compile(
        self,
        params: Any,
        init_kv: Callable[[], Any],
        progress: Progress | None = None,
        stop: Event | None = None,
    ) -> None:
        """Compile everything. params: arrays or ShapeDtypeStructs. `stop` ends it unfinished."""
        place, empty, state = self.placement, *self._empty(init_kv)
        jobs = self._jobs(jax.tree.map(self._abstract, params), state, empty)
        store = None
        if self.folder is not None and self.machine.backend.compile is None:
            made_from = (self.machine.model.config, self.machine.dims, self.machine.backend.name)
            mesh = () if place.key is None else (place.key,)
            made_from = (*made_from, shapes_of(state), *mesh)
            devices = self.machine.backend.devices if self.elsewhere is not None else ()
            store = Store(self.folder / "whole", *made_from, devices=devices)
        done = 0
        with WATCH.building(), ThreadPoolExecutor(os.cpu_count() or 1) as threads:
            # Tracing holds the interpreter, compiling does not: trace here, compile there.
            futures = []
            for job in jobs:
                if stop is not None and stop.is_set():
                    threads.shutdown(cancel_futures=True)
                    raise CancelledError
                here = store is not None and self.elsewhere is None
                if here and store.has(job.name, job.details):
                    futures.append((job, threads.submit(_timed, store.load, job.name, job.details)))
                else:
                    futures.append((job, self._build(job, store, threads)))
            for job, work in futures:
                if stop is not None and stop.is_set():
                    threads.shutdown(cancel_futures=True)
                program, seconds = work.result()
                if program is None:  # it was kept and is of no use
                    program, seconds = self._build(job, store, threads).result()
                self.found += job.name not in self.builds
                self.builds[job.name] = (self.builds.get(job.name, (0.0, 0.0))[0], seconds)
                job.place(program)
                self.made[job.name] = program
                done += 1
                if progress is not None:
                    progress(job.name, done, len(jobs))
        if store is not None and self.found < len(jobs):
            store.prune()

    def _build(self, job: Job, store: Store | None, threads: ThreadPoolExecutor) -> Any:
        """Trace here, compile and keep there: a future of (program, seconds)."""
        backend = self.machine.backend
        if backend.compile is not None:
            return threads.submit(_timed, backend.compile, job)
        began = time.perf_counter()
        arguments, where = job.arguments, {}
        if self.elsewhere is not None:
            arguments = jax.tree.map(self._placed, arguments)
            where = {} if arguments else {"out_shardings": self.elsewhere}
        donate = job.donate if backend.donates else ()
        lowered = jax.jit(job.function, donate_argnums=donate, **where).lower(*arguments)
        options = dict(backend.compiler_options(job.tokens))
        if backend.autotuning and store is not None:
            options[backend.autotuning] = str(store.subfolder("autotuning"))
        self.builds[job.name] = (time.perf_counter() - began, 0.0)

        def work() -> tuple[Any, float]:
            program, seconds = _timed(lowered.compile, compiler_options=options or None)
            if store is not None:
                store.save(job.name, job.details, program)
            return program, seconds

        return threads.submit(work)

    def jobs(self, params: Any, init_kv: Callable[[], Any]) -> list[Job]:
        """Everything to compile, the slowest first. params: arrays or ShapeDtypeStructs."""
        empty, state = self._empty(init_kv)
        return self._jobs(jax.tree.map(self._abstract, params), state, empty)

    def _empty(self, init_kv: Callable[[], Any]) -> tuple[Callable[[], Any], Any]:
        """What makes the empty state, and that state, abstract."""
        place = self.placement
        empty = place.program(lambda: new_state(self.machine, init_kv), (), STATE)
        state = place.abstract(jax.eval_shape(empty), STATE)
        if self.machine.backend.compile is not None:  # every core makes its own
            return lambda: new_state(self.machine, init_kv), state
        return empty, state

    @cached_property
    def placement(self) -> Placement:
        """Where everything lies."""
        return Placement(self.machine.mesh, self.machine.model, send=self.machine.backend.put)

    def _rows(self, *shape: int, dtype: Any = jnp.int32) -> Any:
        """An abstract array that belongs to slots: one shard has `shape`."""
        data = 1 if self.machine.mesh is None else self.machine.mesh.shape["data"]
        return self.placement.abstract(jax.ShapeDtypeStruct((data, *shape), dtype), ROWS)

    def _abstract(self, leaf: Any) -> jax.ShapeDtypeStruct:
        if isinstance(leaf, jax.ShapeDtypeStruct):  # it may say where it lies
            return leaf
        meshed = self.machine.mesh is not None and self.placement.send is None
        where = leaf.sharding if meshed else None
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    def _placed(self, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        """The leaf on the devices that are not here."""
        if leaf.sharding is not None:
            return leaf
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=self.elsewhere)

    def _jobs(self, params: Any, state: Any, empty: Callable[[], Any]) -> list[Job]:
        """Everything to compile, the slowest first."""
        machine, dims, place = self.machine, self.machine.dims, self.placement
        vector = self._rows(plan_size(dims))
        head = machine.model.head(params)
        edited = (state.slots, state.pages, vector)
        jobs = [
            Job(
                "edit",
                self._set("edit"),
                place.program(_edit(machine), (ROWS, ROWS, ROWS), ROWS),
                edited,
                (0, 1),
            ),
            Job("empty", self._set("empty"), empty, ()),
        ]
        # The slowest first, so that they do not end up alone at the end.
        for rows, tokens in sorted(self.shapes(), reverse=True):
            ins: tuple[Any, ...] = (place.params, STATE, *([ROWS] if tokens else []))
            arguments = (params, state, vector) if tokens else (params, state)
            for pages in self.contexts():
                one = _forward(machine, rows, tokens, pages)
                function = place.program(one, ins, (STATE, ROWS, ROWS))
                name = f"forward {rows} rows + {tokens} tokens"
                name += f" of {pages} pages" if pages else ""
                where = self._put(self.forward, forward_key(rows, tokens, pages))
                jobs.append(Job(name, where, function, arguments, (1,), rows + tokens))
        for rows in self.limits.several_rows:
            for greedy in (True, False):
                name = f"{'greedy' if greedy else 'plain'} steps of {rows} rows"
                function = place.program(
                    _several(machine, rows, self.limits.steps, greedy),
                    (place.params, STATE),
                    (STATE, ROWS, ROWS),
                )
                where = self._put(self.several, (rows, greedy))
                static = (self.limits.steps,)
                jobs.append(Job(name, where, function, (params, state), (1,), rows, static))
        for rows, tokens in self.shapes():
            passed = self._passed(params, rows, tokens)
            if tokens and tokens not in self.score:
                hidden = passed.chunk_hidden
                targets = self._rows(2, tokens)
                named = self._rows(CHUNKS, MAX_LOGPROB_TOKEN_IDS)
                most = (self._most_logprobs(),)
                ins = (place.head, ROWS, ROWS, ROWS)
                function = place.program(_score(machine, *most), ins, ROWS)
                where = self._put(self.score, tokens)
                scored = (head, hidden, targets, named)
                jobs.append(
                    Job(f"score {tokens} tokens", where, function, scored, (), tokens, most)
                )
            elif not tokens:
                jobs += self._sample_jobs(head, state.slots, passed, rows)
        return jobs

    def _sample_jobs(self, head: Any, slots: Any, passed: Any, rows: int) -> list[Job]:
        """Sampling sees the same rows whether or not there were chunk tokens beside them."""
        machine = self.machine
        rows_only = replace(passed, chunk_hidden=None)
        mask = self._rows(rows, mask_words(machine.dims.vocab), dtype=jnp.uint32)
        named = self._rows(rows, MAX_LOGPROB_TOKEN_IDS)
        most = (self._most_logprobs(),)
        rich = _rich(machine, *most)
        plain = (head, slots, rows_only)
        place = self.placement

        def cut(function: Any, arguments: tuple[Any, ...]) -> Any:
            return place.program(function, (place.head, *[ROWS] * (len(arguments) - 1)), ROWS)

        return [
            Job(
                f"{name} {rows} rows",
                self._put(where, rows),
                cut(function, arguments),
                arguments,
                (1,),
                rows,
                most,
            )
            for name, where, function, arguments in (
                ("greedy", self.greedy, _greedy(machine), plain),
                ("sample", self.sample, _sample(machine), plain),
                ("masked", self.masked, _masked(machine), (*plain, mask)),
                ("rich", self.rich, rich, (*plain, mask, named)),
            )
        ]

    def _most_logprobs(self) -> int:
        vocab = self.machine.dims.vocab
        return vocab if self.max_logprobs < 0 else max(1, min(self.max_logprobs, vocab))

    def _passed(self, params: Any, rows: int, tokens: int) -> Any:
        """What `forward` of this shape hands to sampling; asking jax for it would trace."""
        weights = jax.tree.leaves(self.machine.model.head(params))
        dtype = weights[0].dtype if weights else jnp.dtype(jnp.float32)
        width = self.machine.model.config.E
        hidden, chunk = (self._rows(count, width, dtype=dtype) for count in (rows, tokens))
        passed: Any = step.Passed
        return passed(hidden, chunk, self._rows(rows, dtype=jnp.bool_))

    def _set(self, name: str) -> Callable[[Any], None]:
        return lambda program: setattr(self, name, program)

    def _put(self, where: dict[Any, Any], key: Any) -> Callable[[Any], None]:
        return lambda program: where.__setitem__(key, program)

    def workspace(self) -> int:
        """The most temporary memory any program needs, in bytes."""
        every = [p for name, p in self.made.items() if name != "empty"]
        sizes = [p.memory_analysis() for p in every if hasattr(p, "memory_analysis")]
        return max((s.temp_size_in_bytes for s in sizes if s is not None), default=0)


def _timed(work: Callable[..., Any], *arguments: Any, **named: Any) -> tuple[Any, float]:
    began = time.perf_counter()
    return work(*arguments, **named), time.perf_counter() - began


def _edit(machine: step.Machine) -> Any:
    def edit(slots: Any, pages: Any, vector: jax.Array) -> Any:
        return as_shard(step.edit(machine, one_shard(slots), one_shard(pages), vector[0]))

    return edit


def _forward(machine: step.Machine, rows: int, tokens: int, context: int = 0) -> Any:
    def forward(params: Any, state: Any, vector: jax.Array | None = None) -> Any:
        plan = None if vector is None else vector[0]
        sizes = {"rows": rows, "tokens": tokens, "context": context}
        out = step.forward(machine, params, one_shard(state), plan, **sizes)
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


def _several(machine: step.Machine, rows: int, steps: int, greedy: bool) -> Any:
    def several(params: Any, state: Any) -> Any:
        """The state after, packed i32[steps, 4, R] and taken i32[steps, ...] of every step."""
        head = machine.model.head(params)

        def one(
            state: EngineState, nothing: None
        ) -> tuple[EngineState, tuple[jax.Array, jax.Array]]:
            state, passed, taken = step.forward(machine, params, state, None, rows=rows, tokens=0)
            slots, packed, _ = step.sample(machine, head, state.slots, passed, greedy=greedy)
            return replace(state, slots=slots), (packed, taken)

        after, (packed, taken) = jax.lax.scan(one, one_shard(state), length=steps)
        return as_shard((after, packed, taken))

    return several


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
