"""The whole engine on executor B: exported, wrapped by the fake neuronx-cc, run by the emulator.

It shows that the engine's arrays, programs and errors go through libnrt's interface and come back
right. What a real compiler and a real core do with them, only an instance shows.
"""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np

from octavo.backends.neuron.executors import Pjrt, donation_works
from octavo.backends.neuron.targets import target_of

ROOT = Path(__file__).resolve().parents[2]


def test_the_engine_writes_on_two_emulated_cores_what_one_sequence_alone_gives(
    emulator_library, tmp_path
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.neuron.two_cores", str(emulator_library), str(tmp_path)],
        env={**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"},
        capture_output=True,
        text=True,
        timeout=400,
        cwd=ROOT,
    )
    assert done.stdout.endswith("equal\n"), done.stderr[-3000:]


def test_donation_is_probed_before_it_is_trusted(monkeypatch) -> None:
    device = jax.devices("cpu")[0]
    assert donation_works(device)
    there = Pjrt(target_of("inf2"), (device,))
    assert there.donates and there.memory() > 0
    monkeypatch.setattr(np, "array_equal", lambda a, b: False)
    assert not donation_works(device)
