"""EchoCore: an engine that computes nothing and answers at once, to measure what stands before it.

Every sequence repeats its prompt, one token a step; OCTAVO_ECHO_STEP_MS paces the steps.
"""

import os
import time

import numpy as np

from octavo.engine.config import EngineConfig
from octavo.engine.messages import AddRequest, Finish, Output, Ready, Start, Stats
from octavo.engine.resident import resident_bytes

CORE = "octavo.bench.echo:EchoCore"
STEP_MS = "OCTAVO_ECHO_STEP_MS"
SLOTS = 16384
CONTEXT = 1 << 20


class EchoCore:
    """As much of an EngineCore as the engine's process needs."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._step = float(os.environ.get(STEP_MS, "0")) / 1e3
        self._due = 0.0
        self._prompts: dict[int, np.ndarray] = {}
        self._left: dict[int, int] = {}
        self._done: dict[int, int] = {}
        self._starts: list[Start] = []
        self._stats = Stats(slots=SLOTS, pages=[1], pages_free=[1], pages_cached=[0])

    def ready(self) -> Ready:
        return Ready(
            model=self._config.model,
            max_model_len=CONTEXT,
            vocab_size=CONTEXT,
            eos_token_ids=[],
            max_num_seqs=SLOTS,
            max_num_batched_tokens=CONTEXT,
            summary=["engine   repeats its prompt: a measurement, not a model"],
            startup_seconds=0.0,
        )

    def add(self, request: AddRequest) -> None:
        prompt = np.frombuffer(request.prompt, "<i4")
        self._stats.prompt_tokens += len(prompt)
        for handle in range(request.handle, request.handle + request.sampling.n):
            self._prompts[handle] = prompt
            self._left[handle] = request.sampling.max_tokens or CONTEXT
            self._done[handle] = 0
            queued = time.monotonic() - request.arrival
            self._starts.append(Start(handle, 0, queued))

    def abort(self, handles: list[int]) -> None:
        for handle in handles:
            self._forget(handle)

    def _forget(self, handle: int) -> None:
        for table in (self._prompts, self._left, self._done):
            table.pop(handle, None)

    def has_work(self) -> bool:
        return bool(self._left)

    def turn(self) -> list[Output]:
        self._pace()
        handles = list(self._left)
        tokens = []
        finished = []
        for handle in handles:
            done = self._done[handle]
            prompt = self._prompts[handle]
            tokens.append(prompt[done % len(prompt)])
            self._done[handle] = done + 1
            if done + 1 >= self._left[handle]:
                finished.append(Finish(handle, "length"))
        for finish in finished:
            self._forget(finish.handle)
        starts, self._starts = self._starts, []
        self._stats.generation_tokens += len(handles)
        self._stats.steps += 1
        return [
            Output(
                handles=np.array(handles, "<u4").tobytes(),
                tokens=np.array(tokens, "<i4").tobytes(),
                starts=starts,
                finished=finished,
            )
        ]

    def _pace(self) -> None:
        """Wait until the next step is due; a late one does not make the next one late."""
        if not self._step:
            return
        now = time.monotonic()
        if now - self._due > 1.0:
            self._due = now
        self._due += self._step
        time.sleep(max(0.0, self._due - now))

    def stats(self) -> Stats:
        self._stats.running = len(self._left)
        self._stats.resident_bytes = resident_bytes()
        return self._stats

    def close(self) -> None:
        self._left.clear()
