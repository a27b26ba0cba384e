"""FakeCore: an engine without a model that answers at once, behind the real process and sockets.

Every sequence repeats its prompt until `max_tokens`, one token a turn. The cache salt of a request
can script more: "fail" ends it with an error, "die" breaks the engine, "hang" makes it silent.
`FAKE_STEP_SECONDS` in the environment is how long a turn takes.
"""

import os
import time

import numpy as np

from octavo.engine.config import ConfigError, EngineConfig
from octavo.engine.messages import (
    FIRST_SLOT,
    AddRequest,
    Finish,
    Logprobs,
    Output,
    PageMap,
    Ready,
    Start,
    Stats,
    View,
)

MAX_MODEL_LEN = 512
SLOTS = 4096


class FakeCore:
    def __init__(self, config: EngineConfig) -> None:
        if config.num_pages == 3:  # a setting that this engine refuses, as a real one may
            raise ConfigError("the cache does not fit", "--num-pages 0 takes what memory allows")
        self.config = config
        self.step_seconds = float(os.environ.get("FAKE_STEP_SECONDS", "0"))
        self.alive: dict[int, tuple[AddRequest, np.ndarray]] = {}
        self.done: dict[int, int] = {}  # tokens given so far
        self.new: list[int] = []
        self.counts = Stats(slots=SLOTS, pages=[100], pages_free=[100], pages_cached=[0])

    def ready(self) -> Ready:
        return Ready(
            model=self.config.model,
            max_model_len=MAX_MODEL_LEN,
            vocab_size=49152,
            eos_token_ids=[2],
            max_num_seqs=SLOTS,
            max_num_batched_tokens=512,
            summary=["fake engine: repeats the prompt"],
            startup_seconds=0.1,
        )

    def add(self, request: AddRequest) -> None:
        prompt = np.frombuffer(request.prompt, "<i4")
        self.counts.prompt_tokens += len(prompt)
        for choice in range(request.sampling.n):
            handle = request.handle + choice
            self.alive[handle] = (request, prompt)
            self.done[handle] = 0
            self.new.append(handle)

    def abort(self, handles: list[int]) -> None:
        for handle in handles:
            self.alive.pop(handle, None)

    def has_work(self) -> bool:
        return bool(self.alive)

    def turn(self) -> list[Output]:
        time.sleep(self.step_seconds)
        started = [Start(h, 0, 0.001) for h in self.new if h in self.alive]
        handles, tokens, finished = [], [], []
        logprobs: list[Logprobs] = []
        for handle, (request, prompt) in list(self.alive.items()):
            self._scripted(request)
            if request.cache_salt == "fail" and self.done[handle] == 2:
                finished.append(Finish(handle, "error", message="it was told to", status=500))
                del self.alive[handle]
                continue
            handles.append(handle)
            tokens.append(int(prompt[self.done[handle] % len(prompt)]))
            logprobs += self._logprobs(handle, request, prompt, tokens[-1])
            self.done[handle] += 1
            most = request.sampling.max_tokens or MAX_MODEL_LEN
            if self.done[handle] >= min(most, MAX_MODEL_LEN - len(prompt)):
                finished.append(Finish(handle, "length"))
                del self.alive[handle]
        self.new = []
        self.counts.generation_tokens += len(handles)
        self.counts.steps += 1
        return [
            Output(
                handles=np.array(handles, "<u4").tobytes(),
                tokens=np.array(tokens, "<i4").tobytes(),
                starts=started,
                finished=finished,
                logprobs=logprobs,
            )
        ]

    def _scripted(self, request: AddRequest) -> None:
        if request.cache_salt == "die":
            raise RuntimeError("the device fell off the bus")
        if request.cache_salt == "hang":
            time.sleep(3600)

    def _logprobs(
        self, handle: int, request: AddRequest, prompt: np.ndarray, token: int
    ) -> list[Logprobs]:
        """The token itself at -0.5, the next k ids behind it."""
        k, ask = request.sampling.logprobs, request.sampling.prompt_logprobs
        rows = []
        if ask is not None and self.done[handle] == 0:
            rows += [self._row(handle, i, int(prompt[i]), ask) for i in range(1, len(prompt))]
        if k is not None:
            rows.append(self._row(handle, len(prompt) + self.done[handle], token, k))
        return rows

    def _row(self, handle: int, position: int, token: int, k: int) -> Logprobs:
        tokens = np.array([token, *(token + i for i in range(k))], "<i4")
        values = np.array([-0.5, *(-0.5 - i for i in range(k))], "<f4")
        return Logprobs(handle, position, tokens.tobytes(), values.tobytes(), rank=1)

    def stats(self) -> Stats:
        self.counts.running = len(self.alive)
        return self.counts

    def view(self) -> View:
        """Every sequence has one page, and the page of its own number was just hit."""
        cells = np.zeros(101, "<u4")
        count = min(len(self.alive), 100)
        cells[1 : 1 + count] = FIRST_SLOT + np.arange(count)
        hits = np.arange(1, 1 + count, dtype="<u4").tobytes()
        rows = [
            (slot, handle, 1, len(self.alive[handle][1]), self.done[handle], MAX_MODEL_LEN, 1)
            for slot, handle in enumerate(list(self.alive)[:count])
        ]
        slots = np.array(rows, "<u4").tobytes()
        page_map = PageMap(101, 0, 1, cells.tobytes(), hits)
        return View(time.monotonic(), self.stats(), 16, [page_map], slots)

    def unwatch(self) -> None:
        self.unwatched = True

    def close(self) -> None:
        self.alive.clear()
