"""EngineCore, the run loop: dispatch step n + 1, then read step n; the host works meanwhile.

    turn:  schedule -> dispatch -> (when `steps_in_flight` steps are out) harvest the oldest

One thread owns an EngineCore. It never tokenizes, never formats, never waits for a client.
"""

import time
from collections.abc import Iterable
from typing import Any

import numpy as np

from octavo.backends.record import Backend
from octavo.engine.assemble import Parts, Progress, assemble, limits_of
from octavo.engine.build import Build
from octavo.engine.config import ConfigError, EngineConfig
from octavo.engine.device import Device
from octavo.engine.grammar.compiler import Compiler
from octavo.engine.harvest import Harvest, harvest, retire
from octavo.engine.host import Host, Launch
from octavo.engine.intake import Intake
from octavo.engine.lanes import choose, rebalance, together
from octavo.engine.link import Leader
from octavo.engine.messages import AddRequest, Finish, Output, Ready, Start, Stats, View
from octavo.engine.planning import check_workspace
from octavo.engine.reader import Reader
from octavo.engine.recovery import Recovery
from octavo.engine.resident import resident_bytes
from octavo.engine.scheduler import schedule, stop
from octavo.engine.sequence import Phase, Sequence
from octavo.engine.several import extend
from octavo.engine.team import agreed, digest
from octavo.engine.view import forget_hits, take_view

STATS_EVERY = 0.25  # seconds between two Stats in the outputs
DEADLINES_EVERY = 0.1  # seconds between two looks at the requests' time limits
COMPILING_WAIT = 0.005  # seconds of a turn that has nothing to do but wait for a grammar


class EngineCore:
    """The engine in this process and thread."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        parts: Parts | None = None,
        progress: Progress | None = None,
        leader: Leader | None = None,
    ) -> None:
        """Load, compile, and be ready. `parts` replaces the checkpoint of the config (benches).

        leader: the line to the other hosts, where the config has several.
        """
        began = time.perf_counter()
        self.config, self.leader = config, leader
        if leader is None and config.hosts != 1:
            raise ConfigError("several hosts need a server", "`octavo serve` takes --hosts")
        if parts is None:
            build = Build(config, progress)
            with build.stopped_by_errors():
                parts = assemble(config, progress, build.begin, self._agree)
        else:
            build = Build(config, progress, parts.params)
            build.begin(parts.backend, parts.resolved)
        self.backend, self.resolved = parts.backend, parts.resolved
        self.eos_token_ids = parts.eos_token_ids
        self.reader = Reader()
        self.limits = limits_of(config, self.resolved)
        self.lanes = [Host(self.limits) for _ in range(self.resolved.lanes)]
        self.grammars = Compiler(parts.vocabulary)
        self.grammars.warm()  # while the programs compile, which leaves the interpreter free
        self.intake = Intake(self.resolved, self.eos_token_ids, config.max_num_queued_reqs)
        tell = leader.order if leader is not None else None
        self.device = Device(parts, self.limits, self.reader, build, tell)
        self.memory = check_workspace(self.resolved, self.device.programs.workspace())
        self.recovery = Recovery(alone=leader is None)
        if leader is not None:
            leader.built(digest(self.resolved))
        self.load_seconds = parts.load_seconds
        self.startup_seconds = time.perf_counter() - began
        self._starts: list[Start] = []
        self._refused: list[Finish] = []
        self._told = self._looked = 0.0
        self._host_seconds = 0.0

    def _agree(self, backend: Backend) -> Backend:
        return backend if self.leader is None else agreed(self.leader.agree, backend)

    # --- requests

    def add(self, request: AddRequest) -> None:
        """Queue a request. One that cannot be served ends as "error" in the next outputs."""
        try:
            sequences = self.intake.sequences(request, self.waiting)
        except ValueError as error:
            count = request.sampling.n
            status = getattr(error, "status", 400)
            self._refused += [
                Finish(request.handle + i, "error", message=str(error), status=status)
                for i in range(count)
            ]
            return
        lane = choose(self.lanes, sequences[0])
        for sequence in sequences:
            sequence.lane = lane
            self.lanes[lane].live[sequence.handle] = sequence
        if request.grammar and not self.grammars.submit(sequences):
            for sequence in sequences:
                sequence.phase = Phase.COMPILING
            self.lanes[lane].compiling.update(sequences)
        else:
            self._enqueue(sequences)

    def _enqueue(self, sequences: list[Sequence]) -> None:
        """The first of a request's sequences waits for a slot, the others for its prompt."""
        host = self.lanes[sequences[0].lane]
        host.enqueue(sequences[0])
        if len(sequences) > 1:
            host.children[sequences[0].serial] = sequences[1:]

    def _take_compiled(self, wait: float = 0.0) -> None:
        """Enqueue those whose grammars are built by now."""
        if not any(host.compiling for host in self.lanes):
            return
        for done in self.grammars.take(wait):
            alive = [s for s in done.sequences if s.phase is Phase.COMPILING]
            for host in self.lanes:
                host.compiling.difference_update(alive)
            if done.problem:
                for sequence in alive:
                    self._fail(sequence, done.problem)
            elif alive:
                self._enqueue(alive)

    def _fail(self, sequence: Sequence, message: str, status: int = 400) -> None:
        """End a sequence with an error."""
        self._remove(sequence)
        self._refused.append(Finish(sequence.handle, "error", message=message, status=status))

    def abort(self, handles: Iterable[int]) -> None:
        """Forget sequences and say no more of them; unknown and finished ones are no error."""
        for handle in handles:
            for host in self.lanes:
                if handle in host.live:
                    self._remove(host.live[handle])

    def _remove(self, sequence: Sequence) -> None:
        host = self.lanes[sequence.lane]
        del host.live[sequence.handle]
        if sequence.phase is Phase.RUNNING:
            stop(host, sequence, Phase.STOPPING)
        elif sequence.phase is Phase.PREEMPTING:
            sequence.phase = Phase.STOPPING
            host.muted[sequence.slot] = True
        elif sequence.phase is Phase.COMPILING:
            sequence.phase = Phase.DONE
            host.compiling.discard(sequence)
        elif sequence.phase is Phase.WAITING:
            sequence.phase = Phase.DONE
            for held in host.children.values():
                if sequence in held:
                    held.remove(sequence)
                    break
            else:
                host.gone += 1
        if sequence.serial in host.children:  # the others go on without their first
            for child in host.children.pop(sequence.serial):
                host.enqueue(child)

    def has_work(self) -> bool:
        """Whether a turn would do anything."""
        busy = any(host.live or host.flights or host.stopping for host in self.lanes)
        return bool(busy or self._refused)

    # --- the loop

    def turn(self) -> list[Output]:
        """Dispatch one step if there is one, harvest until fewer than `steps_in_flight` are out."""
        began, waited = time.perf_counter(), self.reader.counts.waited
        outputs: list[Output] = []
        try:
            self._check_deadlines(began)
            self._take_compiled()
            launch = self._dispatch(outputs)
            host = self.host  # the lanes' flights come and go together
            while host.flights and (host.in_flight >= self.limits.depth or launch is None):
                outputs += self._harvest_program()
                if launch is None:
                    break
        except Exception as error:  # the donated state is gone, whatever it was
            self.recovery.step_failed(self.lanes, error)
            self.device.rebuild()
        if self._refused or self._starts:
            outputs.append(self._output(Harvest()))
        self._host_seconds += time.perf_counter() - began - (self.reader.counts.waited - waited)
        self._tell(outputs)
        return outputs

    def _dispatch(self, outputs: list[Output]) -> Launch | None:
        rebalance(self.lanes)
        launch = schedule(self.lanes)
        extend(self.lanes, launch)
        if launch is None:
            if not self.host.flights and any(host.compiling for host in self.lanes):
                self._take_compiled(COMPILING_WAIT)
            elif not self.host.flights:
                live = any(host.live for host in self.lanes)
                assert not live, "nothing runs and nothing can start"
            return None
        self._note_starts(launch)
        self.device.begin(launch)
        if launch.masked:  # every token so far must be known, while the forward pass runs
            while self.host.flights:
                outputs += self._harvest_program(busy=bool(launch.rows))
        self.device.finish(launch, self.lanes)
        for host, part in zip(self.lanes, launch.parts, strict=True):
            host.flights.append(part.flight)
            host.flights.extend(part.followers)
        for sequence, why in self.device.take_stuck():
            if self.lanes[sequence.lane].live.get(sequence.handle) is sequence:
                self._fail(sequence, f"`structured_outputs` leaves no token to choose: {why}")
        return launch

    def _harvest_program(self, busy: bool = False) -> list[Output]:
        """All steps of the oldest program. busy: a pass was dispatched that is in no flight yet."""
        outputs = [self._output(self._harvest(busy))]
        while self.host.flights and self.host.flights[0].part:
            outputs.append(self._output(self._harvest(busy)))
        return outputs

    def _harvest(self, busy: bool = False) -> Harvest:
        flights = [host.flights[0] for host in self.lanes]
        rows = self.device.read(flights[0], behind=self.host.in_flight - 1 + busy)
        outs = []
        for lane, (host, flight) in enumerate(zip(self.lanes, flights, strict=True)):
            host.flights.popleft()
            outs.append(harvest(host, flight, None if rows is None else rows[lane]))
        out = together(outs)
        if rows is not None:
            prompt = sum(count for flight in flights for _, _, count, _ in flight.chunks)
            self.host.counters.count_iteration(prompt + len(out.tokens))
        return out

    def _note_starts(self, launch: Launch) -> None:
        now = time.monotonic()
        for host, part in zip(self.lanes, launch.parts, strict=True):
            for admission in part.draft.admissions:
                sequence = host.occupant[admission.slot]
                if sequence is not None and not sequence.started:
                    sequence.started = True
                    queued = max(0.0, now - sequence.request.arrival)
                    self._starts.append(Start(sequence.handle, admission.length, queued))

    def _check_deadlines(self, now: float) -> None:
        if now - self._looked < DEADLINES_EVERY:
            return
        self._looked = now
        clock = time.monotonic()
        live = [s for host in self.lanes for s in host.live.values()]
        late = [s for s in live if s.deadline and clock > s.deadline]
        for sequence in late:
            seconds = sequence.request.timeout
            self._fail(sequence, f"the request ran into its own time limit of {seconds:g} s", 408)

    def _output(self, got: Harvest) -> Output:
        out = Output(
            handles=got.handles.astype(np.uint32).tobytes(),
            tokens=got.tokens.astype(np.int32).tobytes(),
            starts=self._starts,
            finished=got.finished + self._refused,
            logprobs=got.logprobs,
        )
        self._starts, self._refused = [], []
        return out

    def _tell(self, outputs: list[Output]) -> None:
        now = time.perf_counter()
        if outputs and now - self._told >= STATS_EVERY:
            self._told = now
            outputs[-1].stats = self.stats()

    # --- facts

    @property
    def host(self) -> Host:
        """The first lane: the only one, but over a mesh with several data shards."""
        return self.lanes[0]

    @property
    def waiting(self) -> int:
        """Sequences in no slot."""
        return sum(host.waiting for host in self.lanes)

    def stats(self) -> Stats:
        """Where the engine stands: the sums over its lanes, which step together."""
        lanes, steps = self.lanes, self.host.counters
        totals = [host.counters for host in lanes]
        groups = list(zip(*(host.pools for host in lanes), strict=True))
        return Stats(
            running=sum(host.running for host in lanes),
            waiting=self.waiting,
            slots=self.limits.dims.slots * len(lanes),
            pages=[sum(pool.group.pages - 1 for pool in pools) for pools in groups],
            pages_free=[sum(pool.free + len(pool.returns) for pool in pools) for pools in groups],
            pages_cached=[sum(pool.index.idle for pool in pools) for pools in groups],
            preemptions=sum(each.preemptions for each in totals),
            prompt_tokens=sum(each.prompt_tokens for each in totals),
            generation_tokens=sum(each.generation_tokens for each in totals),
            prefix_queries=sum(each.prefix_queries for each in totals),
            prefix_hits=sum(each.prefix_hits for each in totals),
            steps=steps.steps,
            stalls=self.reader.counts.stalls,
            compiles_after_ready=self.device.compiles_after_ready,
            host_seconds=self._host_seconds,
            in_flight=len(self.host.flights),
            restarts=self.recovery.restarts,
            evictions=sum(pool.evictions for pools in groups for pool in pools),
            page_waits=sum(each.waits for each in totals),
            deferred=sum(host.deferred for host in lanes),
            iterations=steps.iterations,
            iteration_tokens=steps.iteration_tokens,
            resident_bytes=resident_bytes(),
            hosts=int(self.config.hosts),
            orders=self.leader.orders if self.leader is not None else 0,
            order_bytes=self.leader.order_bytes if self.leader is not None else 0,
        )

    def view(self) -> View:
        """Who has which page and slot, from the host's mirrors alone."""
        return take_view(self.lanes, self.stats(), time.monotonic())

    def unwatch(self) -> None:
        """Nobody looks at views any more."""
        forget_hits(self.lanes)

    def ready(self) -> Ready:
        """What a client must know of this engine."""
        resolved = self.resolved
        return Ready(
            model=self.config.model,
            max_model_len=resolved.max_model_len,
            vocab_size=resolved.dims.vocab,
            eos_token_ids=self.eos_token_ids,
            max_num_seqs=resolved.dims.slots * len(self.lanes),
            max_num_batched_tokens=resolved.token_buckets[-1],
            summary=self.summary(),
            startup_seconds=self.startup_seconds,
            page_size=self.memory.page_size,
            kv_dtype=resolved.kv_dtype.name,
        )

    def summary(self) -> list[str]:
        """The start-up lines."""
        r, memory = self.resolved, self.memory
        parts = f", in each of {len(self.lanes)} data shards" if len(self.lanes) > 1 else ""
        return [
            f"backend  {self.backend.reason}",
            *([f"mesh     {r.mesh_line}"] if r.mesh_line else []),
            f"model    {r.model.config.family}, {r.dtype.name}, context {r.max_model_len:,}",
            f"cache    {memory.tokens:,} tokens in pages of {memory.page_size}; "
            f"{r.dims.slots} slots{parts}",
            f"steps    rows {list(r.row_buckets)}, prompt tokens {list(r.token_buckets)}, "
            f"{self.config.steps_in_flight} in flight",
            f"ready    in {self.startup_seconds:.1f} s (weights {self.load_seconds:.1f} s, "
            f"programs {self.device.compile_seconds:.1f} s)",
        ]

    def drain(self) -> list[Output]:
        """Turn until nothing is left to do."""
        outputs: list[Any] = []
        while self.has_work():
            outputs += self.turn()
        return outputs

    def close(self) -> None:
        """Free the device memory. The engine cannot be used after."""
        for host in self.lanes:
            for sequence in list(host.live.values()):
                if sequence.slot >= 0 and sequence.phase is Phase.RUNNING:
                    retire(host, sequence)
            host.live.clear()
            host.compiling.clear()
            host.flights.clear()
        self.grammars.close()
        self.device.close()
