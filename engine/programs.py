"""The compiled programs: all of them before ready, in parallel, from a persistent cache.

    edit             1
    forward (R, T)   the decode buckets of R with T = 0, and the prompt buckets of T at full R
    sample (R)       greedy, plain, and rich (masks and log probabilities)
    score (T)        log probabilities of prompt tokens
    whole (R)        forward and sample in one, greedy and plain, where the backend wants that
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
from functools import cached_property, partial
from pathlib import Path
from threading import Event
from typing import Any

import jax
import jax.numpy as jnp

from octavo.engine import functions, step, thin
from octavo.engine.compiles import WATCH
from octavo.engine.grammar.guide import mask_words
from octavo.engine.host import Limits
from octavo.engine.mesh import ROWS, STATE, Placement
from octavo.engine.plan import plan_size
from octavo.engine.sampling_params import MAX_LOGPROB_TOKEN_IDS
from octavo.engine.store import Store
from octavo.engine.thin import Thin

Progress = Callable[[str, int, int], None]  # what, done, total


@dataclass
class Job:
    """A program to compile."""

    name: str
    place: Callable[[Any], None]  # where it goes
    function: Any
    arguments: tuple[Any, ...]  # abstract
    donate: tuple[int, ...] = ()
    tokens: int = 0  # that it runs
    static: tuple[Any, ...] = ()  # what the function was made with, besides sizes and model
    slots: tuple[str, ...] = ()  # the leaves of slots that it touches (thin.py); () is all

    @property
    def details(self) -> tuple[Any, ...]:
        """What decides the program besides the model, for a name on disk."""
        return _shapes(self.arguments), self.donate, self.tokens, self.static


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
    whole: dict[tuple[int, bool], Any] = field(default_factory=dict)  # likewise
    # By name: seconds to trace, which one thread does, and seconds of a thread to compile.
    builds: dict[str, tuple[float, float]] = field(default_factory=dict)
    found: int = 0  # programs that were kept from an earlier run
    made: dict[str, Any] = field(default_factory=dict)  # all of them by name
    # A sharding of devices that are not here: what is compiled for them is kept, and not run.
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
        place = self.placement
        state = self.empty_state(init_kv)
        jobs, compiles = self.jobs(params, init_kv), self.machine.backend.compile
        if compiles is None:  # jax's own programs
            jobs = [_thin(job) for job in jobs]
        store = None
        if self.folder is not None and compiles is None:
            made_from = (self.machine.model.config, self.machine.dims, self.machine.backend.name)
            mesh = () if place.key is None else (place.key,)
            made_from = (*made_from, _shapes(state), *mesh)
            store = Store(self.folder / "whole", *made_from, devices=self._devices())
        done = 0
        with WATCH.building(), ThreadPoolExecutor(os.cpu_count() or 1) as threads:
            # Tracing holds the interpreter, compiling does not: trace here, compile there.
            futures = []
            for job in jobs:
                if stop is not None and stop.is_set():
                    threads.shutdown(cancel_futures=True)
                    raise CancelledError
                kept = store if self.elsewhere is None else None
                if kept is not None and kept.has(job.name, job.details):
                    futures.append((job, threads.submit(_timed, kept.load, job.name, job.details)))
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
                job.place(Thin(program, job.slots) if job.slots and compiles is None else program)
                self.made[job.name] = program
                done += 1
                if progress is not None:
                    progress(job.name, done, len(jobs))
        if store is not None and self.found < len(jobs):
            store.prune()

    def _build(self, job: "Job", store: Store | None, threads: ThreadPoolExecutor) -> Any:
        """Trace here, compile and keep there: a future of (program, seconds)."""
        backend = self.machine.backend
        if backend.compile is not None:
            return threads.submit(_timed, backend.compile, job)
        began = time.perf_counter()
        # What has no argument would be compiled for the device that is here.
        alone = self.elsewhere is not None and self.machine.mesh is None and not job.arguments
        where = {"out_shardings": self.elsewhere} if alone else {}
        lowered = jax.jit(job.function, donate_argnums=job.donate, **where).lower(*job.arguments)
        options = dict(backend.compiler_options(job.tokens))
        if self.machine.mesh is not None:
            options = {**backend.mesh_options(job.tokens), **options}
        if backend.autotuning and store is not None:
            options[backend.autotuning] = str(store.subfolder("autotuning"))
        self.builds[job.name] = (time.perf_counter() - began, 0.0)

        def work() -> tuple[Any, float]:
            program, seconds = _timed(lowered.compile, compiler_options=options or None)
            if store is not None:
                store.save(job.name, job.details, program)
            return program, seconds

        return threads.submit(work)

    @cached_property
    def placement(self) -> Placement:
        """Where everything lies."""
        backend, here = self.machine.backend, self.elsewhere
        return Placement(self.machine.mesh, self.machine.model, here, backend.put)

    def _devices(self) -> tuple[Any, ...]:
        """What the programs run on, in the mesh's order."""
        mesh = self.machine.mesh
        return self.machine.backend.devices[:1] if mesh is None else tuple(mesh.devices.flat)

    def _rows(self, *shape: int, dtype: Any = jnp.int32) -> Any:
        """An abstract array that belongs to slots: one shard has `shape`."""
        data = 1 if self.machine.mesh is None else self.machine.mesh.shape["data"]
        return self.placement.abstract(jax.ShapeDtypeStruct((data, *shape), dtype), ROWS)

    def _empty(self, init_kv: Callable[[], Any], *, each: bool = False) -> Callable[[], Any]:
        """What makes an empty state; `each`: what every core makes for itself."""
        make = partial(functions.new_state, self.machine, init_kv)
        return make if each else self.placement.program(make, (), STATE)

    def empty_state(self, init_kv: Callable[[], Any]) -> Any:
        """Its arrays, abstract."""
        return self.placement.abstract(jax.eval_shape(self._empty(init_kv)), STATE)

    def jobs(self, params: Any, init_kv: Callable[[], Any]) -> list[Job]:
        """Everything to compile, the slowest first. params: arrays or ShapeDtypeStructs.

        Raises what the backend's `check_jobs` does.
        """
        machine, dims, place = self.machine, self.machine.dims, self.placement
        params, state = place.abstract(params, place.params), self.empty_state(init_kv)
        empty = self._empty(init_kv, each=place.cores)
        vector = self._rows(plan_size(dims))
        head = machine.model.head(params)
        edited = (state.slots, state.pages, vector)
        jobs = [
            Job(
                "edit",
                self._set("edit"),
                place.program(functions.edit(machine), (ROWS, ROWS, ROWS), ROWS),
                edited,
                (0, 1),
            ),
            Job("empty", self._set("empty"), empty, ()),
        ]
        for rows, tokens in self.shapes():
            ins: tuple[Any, ...] = (place.params, STATE, *([ROWS] if tokens else []))
            arguments = (params, state, vector) if tokens else (params, state)
            slots = thin.CHUNKS if tokens else thin.ROWS
            for pages in self.contexts():
                forward = functions.forward(machine, rows, tokens, pages)
                function = place.program(forward, ins, (STATE, ROWS, ROWS))
                name = f"forward {rows} rows + {tokens} tokens"
                name += f" of {pages} pages" if pages else ""
                where = self._put(self.forward, functions.forward_key(rows, tokens, pages))
                jobs.append(Job(name, where, function, arguments, (1,), rows + tokens, (), slots))
        jobs += self._whole_jobs(params, state)
        jobs += self._several_jobs(params, state)
        # The slowest first, so that they do not end up alone at the end.
        jobs.sort(key=lambda job: -job.tokens)
        for rows, tokens in self.shapes():
            passed = self._passed(params, rows, tokens)
            if tokens and tokens not in self.score:
                hidden = passed.chunk_hidden
                targets = self._rows(2, tokens)
                named = self._rows(dims.chunks, MAX_LOGPROB_TOKEN_IDS)
                most = (self._most_logprobs(),)
                ins = (place.head, ROWS, ROWS, ROWS)
                function = place.program(functions.score(machine, *most), ins, ROWS)
                where = self._put(self.score, tokens)
                scored = (head, hidden, targets, named)
                jobs.append(
                    Job(f"score {tokens} tokens", where, function, scored, (), tokens, most)
                )
            elif not tokens:
                jobs += self._sample_jobs(head, state.slots, passed, rows)
        machine.backend.check_jobs(jobs)
        return jobs

    def _whole_jobs(self, params: Any, state: Any) -> list[Job]:
        """Decode steps that are one program, where a dispatch is what a step waits for."""
        if not self.machine.backend.whole_steps:
            return []
        place = self.placement
        ins = (place.params, STATE)
        return [
            Job(
                f"{'greedy' if greedy else 'plain'} step of {rows} rows",
                self._put(self.whole, (rows, greedy)),
                place.program(
                    functions.whole(self.machine, rows, greedy), ins, (STATE, ROWS, ROWS)
                ),
                (params, state),
                (1,),
                rows,
                (),
                thin.GREEDY if greedy else thin.SAMPLE,
            )
            for rows in self.limits.row_buckets
            for greedy in (True, False)
        ]

    def _several_jobs(self, params: Any, state: Any) -> list[Job]:
        """A few decode steps that are one program, for small models."""
        place, jobs = self.placement, []
        for rows in self.limits.several_rows:
            for greedy in (True, False):
                name = f"{'greedy' if greedy else 'plain'} steps of {rows} rows"
                function = place.program(
                    functions.several(self.machine, rows, self.limits.steps, greedy),
                    (place.params, STATE),
                    (STATE, ROWS, ROWS),
                )
                where = self._put(self.several, (rows, greedy))
                static = (self.limits.steps,)
                read = thin.GREEDY if greedy else thin.SAMPLE
                jobs.append(Job(name, where, function, (params, state), (1,), rows, static, read))
        return jobs

    def _sample_jobs(self, head: Any, slots: Any, passed: Any, rows: int) -> list[Job]:
        """Sampling sees the same rows whether or not there were chunk tokens beside them."""
        machine = self.machine
        rows_only = replace(passed, chunk_hidden=None)
        mask = self._rows(rows, mask_words(machine.dims.vocab), dtype=jnp.uint32)
        named = self._rows(rows, MAX_LOGPROB_TOKEN_IDS)
        most = (self._most_logprobs(),)
        rich = functions.rich(machine, *most)
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
                thin.GREEDY if name == "greedy" else thin.SAMPLE,
            )
            for name, where, function, arguments in (
                ("greedy", self.greedy, functions.greedy(machine), plain),
                ("sample", self.sample, functions.sample(machine), plain),
                ("masked", self.masked, functions.masked(machine), (*plain, mask)),
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
        programs = [p for name, p in self.made.items() if name != "empty"]
        sizes = [p.memory_analysis() for p in programs if hasattr(p, "memory_analysis")]
        return max((s.temp_size_in_bytes for s in sizes if s is not None), default=0)


def _shapes(tree: Any) -> tuple[Any, ...]:
    """Everything about a tree of abstract arrays that a program depends on."""
    leaves, structure = jax.tree.flatten(tree)
    return [(leaf.shape, str(leaf.dtype)) for leaf in leaves], str(structure)


def _timed(work: Callable[..., Any], *arguments: Any, **named: Any) -> tuple[Any, float]:
    began = time.perf_counter()
    return work(*arguments, **named), time.perf_counter() - began


def _thin(job: Job) -> Job:
    """The job with the state that it touches."""
    if not job.slots:
        return job
    params, state, *more = job.arguments
    return replace(job, arguments=(params, thin.lend(state, job.slots), *more))
