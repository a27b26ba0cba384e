"""The whole engine on executor B: exported, wrapped by the fake neuronx-cc, run by the emulator.

It shows that the engine's arrays, programs and errors go through libnrt's interface and come back
right. What a real compiler and a real core do with them, only an instance shows.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from octavo.backends.neuron.cache import NeffCache
from octavo.backends.neuron.choose import with_executor
from octavo.backends.neuron.compiler import Compiler
from octavo.backends.neuron.executors import Aot, Pjrt, donation_works
from octavo.backends.neuron.runner import Cores
from octavo.backends.neuron.targets import target_of
from octavo.engine.core import EngineCore
from tests.engine.tiny import LLAMA, Client, Reference, make_parts
from tests.neuron.emulator.host import attach

SETTINGS: dict[str, Any] = {
    "max_num_seqs": 2,
    "max_num_batched_tokens": 32,
    "page_size": 8,
    "num_pages": 100,
    "dtype": "float32",
    "max_logprobs": 3,
}
INF2 = target_of("inf2")


class Ran:
    """An engine on the emulator, and what its texts must be."""

    def __init__(self, library: Path, fake: Compiler, folder: Path) -> None:
        self.emulator = attach(str(library))
        self.emulator.become()
        executor = Aot(Cores(str(library)), NeffCache(folder, fake), INF2)
        backend = with_executor(executor, INF2, "the emulator")
        parts = make_parts(LLAMA, backend=lambda _: backend, **SETTINGS)
        self.reference = Reference(parts)
        params = jax.tree.map(lambda leaf: executor.put(np.asarray(leaf)), parts.params)
        self.core = EngineCore(parts.resolved.config, parts=replace(parts, params=params))

    def check_texts(self) -> None:
        """Of three prompts at once, one of them longer than a chunk."""
        client = Client(self.core)
        random = np.random.default_rng(3)
        prompts = [random.integers(0, 128, size).tolist() for size in (3, 50, 17)]
        handles = [client.add(prompt, max_tokens=24, temperature=0) for prompt in prompts]
        client.drain()
        for handle, prompt in zip(handles, prompts, strict=True):
            assert client.tokens[handle] == self.reference.text(prompt, 24)


@pytest.fixture(scope="module")
def ran(
    emulator_library: Path, fake: Compiler, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Ran]:
    ran = Ran(emulator_library, fake, tmp_path_factory.mktemp("neffs"))
    before = ran.emulator.counts()
    assert before[2] >= 8, "every program is on the core"
    yield ran
    ran.core.close()
    assert ran.emulator.counts() == (0, 0, 0), "tensors, sets and models that nobody freed"


def test_the_engine_writes_on_the_emulator_what_one_sequence_alone_gives(ran) -> None:
    ran.check_texts()
    assert ran.emulator.executed > 50 and ran.core.stats().restarts == 0


def test_a_step_that_fails_on_the_emulated_core_is_run_again(ran) -> None:
    ran.emulator.fail_next(1004)
    ran.check_texts()
    assert ran.core.stats().restarts == 1


def test_donation_is_probed_before_it_is_trusted(monkeypatch) -> None:
    device = jax.devices("cpu")[0]
    assert donation_works(device)
    there = Pjrt(INF2, (device,))
    assert there.donates and there.memory() > 0
    monkeypatch.setattr(np, "array_equal", lambda a, b: False)
    assert not donation_works(device)
