"""EncoderCore: the engine for models that read. Texts wait, run in batches, and leave as vectors.

    turn:  choose a batch -> dispatch -> (when `steps_in_flight` are out) read the oldest

The same protocol as EngineCore's, so that the same loop, sockets and messages serve both. It has no
pages and no state: a batch that fails takes only its own texts along.
"""

import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from octavo.engine.compiles import WATCH
from octavo.engine.config import EngineConfig
from octavo.engine.device import use_cache
from octavo.engine.encode import EncodePrograms
from octavo.engine.encoder_plan import Encoder, Progress, assemble_encoder, check_encoder
from octavo.engine.messages import Encoded, EncodeRequest, Finish, Output, Pooler, Ready, Stats
from octavo.engine.packing import Batch, Job, choose, pack
from octavo.engine.reader import Reader

STATS_EVERY = 0.25  # seconds between two Stats in the outputs
MOST_FAILURES = 3  # batches in a row that may fail before the engine gives up


@dataclass
class Flight:
    """A dispatched batch; its texts' vectors are rows of `result`, in their order."""

    batch: Batch
    result: Any


class EncoderCore:
    """The reading engine in this process and thread."""

    def __init__(self, config: EngineConfig, *, progress: Progress | None = None) -> None:
        """Load, compile, and be ready."""
        began = time.perf_counter()
        self.config = config
        self.encoder: Encoder = assemble_encoder(config, progress)
        self.reader = Reader()
        use_cache(config.compilation_cache)
        compiling = time.perf_counter()
        self.programs = EncodePrograms(self.encoder.reading)
        self.programs.compile(self.encoder.params, self.encoder.sizes.shapes, progress)
        self.plan = check_encoder(self.encoder.sizes, self.programs.workspace())
        self.compile_seconds = time.perf_counter() - compiling
        self._compiled = WATCH.unexpected
        self.startup_seconds = time.perf_counter() - began
        self._waiting: dict[int, Job] = {}  # by handle, oldest first
        self._flying: set[int] = set()  # handles whose vectors somebody still wants
        self._flights: deque[Flight] = deque()
        self._refused: list[Finish] = []
        self._failures = 0
        self._counts = Stats(slots=max(s.texts for s in self.encoder.sizes.shapes))
        self._told = 0.0

    # --- requests

    def add(self, request: EncodeRequest, *, bounded: bool = True) -> None:
        """Queue a text; not `bounded`, however many wait. ValueError for one that is too long."""
        ids = np.frombuffer(request.prompt, "<i4")
        longest = self.encoder.sizes.max_model_len
        if not 0 < len(ids) <= longest:
            raise ValueError(f"a text needs 1 to {longest:,} tokens here, got {len(ids):,}")
        if bounded and len(self._waiting) >= self.config.max_num_queued_reqs:
            limit = self.config.max_num_queued_reqs
            self._refuse(request.handle, f"{limit:,} texts wait already: try again later", 503)
            return
        self._waiting[request.handle] = Job(request.handle, ids, request.second, request.arrival)
        self._counts.prompt_tokens += len(ids)

    def abort(self, handles: Iterable[int]) -> None:
        """Forget texts; unknown and finished ones are no error."""
        for handle in handles:
            self._waiting.pop(handle, None)
            self._flying.discard(handle)

    def _refuse(self, handle: int, message: str, status: int) -> None:
        self._refused.append(Finish(handle, "error", message=message, status=status))

    def has_work(self) -> bool:
        """Whether a turn would do anything."""
        return bool(self._waiting or self._flights or self._refused)

    # --- the loop

    def turn(self) -> list[Output]:
        """Dispatch a batch if texts wait, then read until fewer than `steps_in_flight` are out."""
        began, waited = time.perf_counter(), self.reader.counts.waited
        out = Output()
        batch = self._dispatch()
        while self._flights and (
            batch is None or len(self._flights) >= self.config.steps_in_flight
        ):
            self._harvest(out)
            if batch is None:
                break
        out.finished += self._refused
        self._refused = []
        self._counts.host_seconds += (
            time.perf_counter() - began - (self.reader.counts.waited - waited)
        )
        if began - self._told >= STATS_EVERY:
            self._told = began
            out.stats = self.stats()
        return [out] if out.encoded or out.finished or out.stats is not None else []

    def _dispatch(self) -> Batch | None:
        if not self._waiting:
            return None
        batch = choose(self._waiting.values(), self.encoder.sizes.shapes)
        for job in batch.jobs:
            del self._waiting[job.handle]
            self._flying.add(job.handle)
        try:
            vector = jax.device_put(pack(batch))
            result = self.programs.by_shape[batch.shape](self.encoder.params, vector)
            self.reader.expect(result)
        except Exception as error:
            self._fail(batch, error)
            return batch
        self._flights.append(Flight(batch, result))
        self._counts.steps += 1
        return batch

    def _harvest(self, out: Output) -> None:
        flight = self._flights.popleft()
        try:
            vectors = self.reader.read(flight.result, behind=len(self._flights))
        except Exception as error:
            self._fail(flight.batch, error)
            return
        self._failures = 0
        for job, vector in zip(flight.batch.jobs, vectors, strict=False):
            if job.handle in self._flying:
                self._flying.remove(job.handle)
                out.encoded.append(Encoded(job.handle, vector.astype("<f4").tobytes()))
                out.finished.append(Finish(job.handle, "stop"))

    def _fail(self, batch: Batch, error: Exception) -> None:
        """The texts of a failed batch end with its reason; the engine goes on, for a while."""
        self._failures += 1
        if self._failures >= MOST_FAILURES:
            raise error
        for job in batch.jobs:
            if job.handle in self._flying:
                self._flying.remove(job.handle)
                self._refuse(job.handle, f"the batch of this text failed: {error}", 500)

    # --- facts

    def stats(self) -> Stats:
        """Where the engine stands."""
        counts = self._counts
        counts.running, counts.waiting = len(self._flying), len(self._waiting)
        counts.in_flight, counts.stalls = len(self._flights), self.reader.counts.stalls
        counts.compiles_after_ready = WATCH.unexpected - self._compiled
        return counts

    def ready(self) -> Ready:
        """What a client must know of this engine."""
        sizes, pooling = self.encoder.sizes, self.encoder.pooling
        labels = sizes.model.config.labels
        return Ready(
            model=self.config.model,
            max_model_len=sizes.max_model_len,
            vocab_size=sizes.model.config.V,
            eos_token_ids=[],
            max_num_seqs=self._counts.slots,
            max_num_batched_tokens=max(shape.tokens for shape in sizes.shapes),
            summary=self.summary(),
            startup_seconds=self.startup_seconds,
            pooler=Pooler(
                task="score" if labels else "embed",
                size=self.encoder.reading.size,
                normalize=pooling.normalize,
                dimensions=list(pooling.dimensions),
                activation=pooling.activation,
            ),
        )

    def summary(self) -> list[str]:
        """The start-up lines."""
        sizes, reading = self.encoder.sizes, self.encoder.reading
        facts = sizes.model.config
        gives = f"{facts.labels} labels" if facts.labels else f"vectors of {facts.E}"
        how = "classifier" if facts.labels else f"pooling {reading.mode}"
        widths = sorted({shape.width for shape in sizes.shapes})
        return [
            f"backend  {reading.backend.reason}",
            f"model    {facts.family}, {sizes.dtype.name}, texts of up to "
            f"{sizes.max_model_len:,} tokens",
            f"gives    {gives}, {how}",
            f"steps    rows of {widths} tokens, up to "
            f"{max(shape.tokens for shape in sizes.shapes):,} tokens together",
            f"ready    in {self.startup_seconds:.1f} s (weights {self.encoder.load_seconds:.1f} s, "
            f"programs {self.compile_seconds:.1f} s)",
        ]

    @property
    def params(self) -> Any:
        """The weights, on the device."""
        return self.encoder.params

    def drain(self) -> list[Output]:
        """Turn until nothing is left to do."""
        outputs: list[Output] = []
        while self.has_work():
            outputs += self.turn()
        return outputs

    def close(self) -> None:
        """Free the device memory. The engine cannot be used after."""
        self._waiting.clear()
        self._flights.clear()
        for leaf in jax.tree.leaves(self.encoder.params):
            if not leaf.is_deleted():
                leaf.delete()
        self.programs = None  # type: ignore[assignment]
