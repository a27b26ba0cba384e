"""SmolLM2-135M beside llama.cpp on the same file, in turns, on this machine's processor.

llama.cpp computes with the file's own Q4_1 weights and is asked for no sampling, which is to its
advantage; Octavo runs as a user would run it. Both use as many threads as there are processors.
It needs the Python package of llama.cpp: pip install llama-cpp-python (compiles, about 15 minutes
on 2 cores).

example:
  octavo bench llamacpp --rounds 3
"""

from __future__ import annotations

import argparse
import ctypes
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from typing import Any

import octavo
from octavo.bench.common import Row, Spread, random_prompts, report
from octavo.cli.options import add_config_flags, config_from_args
from octavo.engine.config import ConfigError
from octavo.models.sources.builtin import builtin_file

MODEL = "smollm2-135m"


@dataclass(frozen=True)
class Case:
    """Some streams that begin together."""

    name: str
    streams: int
    prompt: int  # tokens per stream
    output: int  # tokens per stream; 1 measures the prompt

    @property
    def tokens(self) -> int:
        """The tokens that the rate counts: prompt tokens where only one token is made."""
        return self.streams * (self.prompt if self.output == 1 else self.output)


CASES = (
    Case("prompt", 1, 512, 1),
    Case("1 stream", 1, 16, 96),
    Case("8 streams", 8, 16, 96),
    Case("32 streams", 32, 16, 96),
)
# Prompt tokens of a decode case are few, but they are run and their time is in the figure of both.

Runner = Callable[[Case, list[list[int]]], float]  # seconds of one case


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The engine's flags; the model stays SmolLM2."""
    add_config_flags(parser, positional_model=False)
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="turns (default: 3)")


def run(args: argparse.Namespace) -> int:
    """Measure in turns and print."""
    config = replace(config_from_args(args), model=MODEL)
    try:
        bindings = import_module("llama_cpp")
    except ImportError:
        raise ConfigError(
            "the Python package of llama.cpp is not installed",
            "pip install llama-cpp-python (compiles, about 15 minutes on 2 cores)",
        ) from None
    llm = octavo.LLM(**asdict(config))
    peer = LlamaCpp(bindings, str(builtin_file(MODEL)))
    runners: dict[str, Runner] = {"octavo": octavo_runner(llm), "llama.cpp": peer.seconds}
    rates: dict[tuple[str, str], list[float]] = {}
    for number in range(args.rounds + 1):
        for case in CASES:
            for who, seconds in runners.items():
                prompts = random_prompts(
                    case.streams, case.prompt, vocab_size=llm.vocab_size, seed=number
                )
                rate = case.tokens / seconds(case, prompts)
                if number:  # the first turn warms up
                    rates.setdefault((case.name, who), []).append(rate)
    llm.close()
    rows = [Row(case, f"{who} tok/s", Spread.of(r)) for (case, who), r in rates.items()]
    for case in CASES:
        ours, theirs = rates[case.name, "octavo"], rates[case.name, "llama.cpp"]
        ratio = [a / b for a, b in zip(ours, theirs, strict=True)]
        rows.append(Row(case.name, "octavo / llama.cpp", Spread.of(ratio), 2))
    return report("llamacpp", {"rounds": args.rounds, **config.overrides()}, rows, args)


def octavo_runner(llm: octavo.LLM) -> Runner:
    """Seconds of a case through the Python API."""

    def seconds(case: Case, prompts: list[list[int]]) -> float:
        sampling = octavo.SamplingParams(temperature=0, max_tokens=case.output, ignore_eos=True)
        started = time.perf_counter()
        llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)
        return time.perf_counter() - started

    return seconds


class LlamaCpp:
    """llama.cpp through its C interface, one batch of all streams per step."""

    def __init__(self, bindings: Any, path: str) -> None:
        self.c = bindings
        bindings.llama_backend_init()
        # Its log is long and is not about the measurement; the callback must stay referenced.
        self._quiet = bindings.llama_log_callback(lambda level, text, data: None)
        bindings.llama_log_set(self._quiet, ctypes.c_void_p(0))
        self.model = bindings.llama_model_load_from_file(
            path.encode(), bindings.llama_model_default_params()
        )
        params = bindings.llama_context_default_params()
        params.n_ctx = max(case.streams * (case.prompt + case.output) for case in CASES)
        params.n_batch = params.n_ubatch = 512
        params.n_seq_max = max(case.streams for case in CASES)
        params.n_threads = params.n_threads_batch = len(os.sched_getaffinity(0))
        params.kv_unified = True
        self.context = bindings.llama_init_from_model(self.model, params)
        self.batch = bindings.llama_batch_init(512, 0, 1)

    def seconds(self, case: Case, prompts: list[list[int]]) -> float:
        """Run a case; the token fed back is the prompt's last one, whatever the logits say."""
        self.c.llama_memory_clear(self.c.llama_get_memory(self.context), True)
        started = time.perf_counter()
        rows = [(s, i, t) for s, prompt in enumerate(prompts) for i, t in enumerate(prompt)]
        last = case.prompt - 1
        for first in range(0, len(rows), 512):
            self._decode(rows[first : first + 512], lambda position: position == last)
        for step in range(case.output - 1):
            position = case.prompt + step
            self._decode([(s, position, p[-1]) for s, p in enumerate(prompts)], lambda _: True)
        return time.perf_counter() - started

    def _decode(self, rows: list[tuple[int, int, int]], wanted: Callable[[int], bool]) -> None:
        """One llama_decode over (stream, position, token) rows; reads the logits of the wanted."""
        batch = self.batch
        batch.n_tokens = len(rows)
        for i, (stream, position, token) in enumerate(rows):
            batch.token[i] = token
            batch.pos[i] = position
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = stream
            batch.logits[i] = wanted(position)
        code = self.c.llama_decode(self.context, batch)
        assert code == 0, f"{code=}"
        if wanted(rows[-1][1]):
            self.c.llama_get_logits_ith(self.context, len(rows) - 1)  # waits for the result
