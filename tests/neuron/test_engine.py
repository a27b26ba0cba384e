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
from tests.engine.tiny import LLAMA, Client, make_engine, make_parts
from tests.neuron.emulator.host import Emulator

SETTINGS: dict[str, Any] = {
    "max_num_seqs": 2,
    "max_num_batched_tokens": 32,
    "page_size": 8,
    "num_pages": 100,
    "dtype": "float32",
    "max_logprobs": 3,
}
INF2 = target_of("inf2")


@pytest.fixture
def core(
    emulator: Emulator, emulator_library: Path, fake: Compiler, tmp_path: Path
) -> Iterator[EngineCore]:
    """A tiny Llama on the emulator."""
    executor = Aot(Cores(str(emulator_library)), NeffCache(tmp_path, fake), INF2)
    parts = make_parts(
        LLAMA, backend=lambda _: with_executor(executor, INF2, "the emulator"), **SETTINGS
    )
    params = jax.tree.map(lambda leaf: executor.put(np.asarray(leaf)), parts.params)
    core = EngineCore(parts.resolved.config, parts=replace(parts, params=params))
    yield core
    core.close()


def texts(core: EngineCore, **sampling: Any) -> list[list[int]]:
    client = Client(core)
    random = np.random.default_rng(3)
    handles = [
        client.add(random.integers(0, 128, size).tolist(), max_tokens=24, **sampling)
        for size in (3, 50, 17)
    ]
    client.drain()
    assert all(client.finished[h].reason == "length" for h in handles), client.finished
    return [client.tokens[h] for h in handles]


def test_the_engine_writes_on_the_emulator_what_it_writes_on_the_cpu(core, emulator) -> None:
    on_cpu = make_engine(make_parts(LLAMA, **SETTINGS))
    for sampling in ({"temperature": 0}, {"temperature": 1.0, "seed": 7, "top_k": 20}):
        assert texts(core, **sampling) == texts(on_cpu, **sampling)
    on_cpu.close()
    assert core.stats().compiles_after_ready == 0
    assert emulator.executed > 100 and core.device.programs.found == 0


def test_a_step_that_fails_on_the_emulated_core_is_run_again(core, emulator) -> None:
    right = texts(core, temperature=0)
    emulator.fail_next(1004)
    assert texts(core, temperature=0) == right
    assert core.stats().restarts == 1


def test_donation_is_probed_before_it_is_trusted(monkeypatch) -> None:
    device = jax.devices("cpu")[0]
    assert donation_works(device)
    there = Pjrt(INF2, (device,))
    assert there.donates and there.memory() > 0
    right = np.array_equal
    seen: list[int] = []
    monkeypatch.setattr(np, "array_equal", lambda a, b: bool(seen.append(1)) or right(a, b + 1))
    assert not donation_works(device)
