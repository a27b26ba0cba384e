"""A tiny engine on two emulated cores; test_engine.py runs it in a process with two CPU devices.

python -m tests.neuron.two_cores LIBRARY FOLDER
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from octavo.backends.neuron.cache import NeffCache
from octavo.backends.neuron.choose import with_executor
from octavo.backends.neuron.compiler import Compiler
from octavo.backends.neuron.executors import Aot
from octavo.backends.neuron.runner import Cores
from octavo.backends.neuron.targets import target_of
from octavo.engine.assemble import Parts, place_of
from octavo.engine.config import EngineConfig
from octavo.engine.core import EngineCore
from octavo.engine.memory import resolve
from octavo.models.config import ModelConfig
from octavo.models.load import random_params
from tests.engine.tiny import LLAMA, Client, Reference, make_parts
from tests.neuron.conftest import FAKE
from tests.neuron.emulator.host import attach

SETTINGS: dict[str, Any] = {
    "max_num_seqs": 2,
    "max_num_batched_tokens": 32,
    "page_size": 8,
    "num_pages": 100,
    "dtype": "float32",
    "max_logprobs": 3,
}


def main(library: str, folder: str) -> None:
    """Write the same texts as one sequence alone, before and after a step that fails."""
    emulator = attach(library)
    emulator.become()
    reference = Reference(make_parts(LLAMA, **SETTINGS))
    cache = NeffCache(Path(folder), Compiler(FAKE, "fake-1", jobs=2))
    executor = Aot(Cores(library, 2), cache, target_of("inf2"))
    made = with_executor(executor, "two emulated cores")
    backend = replace(made, row_buckets=lambda most: (most,))  # fewer graphs
    config = EngineConfig(compilation_cache="none", mesh="model=2", **SETTINGS)
    resolved = resolve(config, backend, ModelConfig.from_hf(LLAMA))
    place = place_of(backend, resolved)
    params = random_params(place.model, 1, resolved.dtype, put=place.put_weight)
    core = EngineCore(config, parts=Parts(backend, resolved, params, [], 0.0))
    check(core, reference)
    emulator.fail_next(1004)
    check(core, reference)
    assert core.stats().restarts == 1
    core.close()
    assert emulator.counts() == (0, 0, 0), "tensors, sets and models that nobody freed"
    print("equal")


def check(core: EngineCore, reference: Reference) -> None:
    """Three prompts at once, one of them longer than a chunk."""
    client = Client(core)
    random = np.random.default_rng(3)
    prompts = [random.integers(0, 128, size).tolist() for size in (3, 50, 17)]
    handles = [client.add(prompt, max_tokens=24, temperature=0) for prompt in prompts]
    client.drain()
    for handle, prompt in zip(handles, prompts, strict=True):
        assert client.tokens[handle] == reference.text(prompt, 24)


if __name__ == "__main__":
    main(*sys.argv[1:])
