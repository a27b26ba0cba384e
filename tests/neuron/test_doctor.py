"""`octavo doctor neuron`: honest where there is nothing; every check runs, on the emulator."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def doctor(**environment: str) -> tuple[int, dict[str, str]]:
    """The exit code, and each check's result with what was found."""
    done = subprocess.run(
        [sys.executable, "-m", "octavo", "doctor", "neuron"],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=200,
        cwd=ROOT,
    )
    lines = done.stdout.splitlines()
    assert lines and lines[0].startswith("check"), done.stderr
    at = lines[0].index("result")
    return done.returncode, {line[:at].strip(): line[at:] for line in lines[1:]}


@pytest.mark.skipif(Path("/dev/neuron0").exists(), reason="there is a device here")
def test_the_doctor_says_that_there_is_no_device(tmp_path) -> None:
    code, told = doctor(OCTAVO_NEURON_LIBNRT="/nowhere", OCTAVO_NEURON_CACHE=str(tmp_path / "n"))
    assert code == 1
    assert told["devices"].startswith("failed") and "no device" in told["devices"]
    assert told["paged attention, three steps in place"].startswith("not applicable")
    assert not any(line.startswith("proven") for line in told.values())


def test_every_check_of_the_doctor_runs_on_the_emulator(emulator_library, tmp_path) -> None:
    code, told = doctor(
        OCTAVO_NEURON_LIBNRT=str(emulator_library),
        OCTAVO_NEURON_COMPILER=str(ROOT / "tests" / "neuron" / "fake_neuronx_cc.py"),
        OCTAVO_NEURON_CACHE=str(tmp_path / "neffs"),
        XLA_FLAGS="--xla_force_host_platform_device_count=2",
    )
    assert code == 0, told
    for check in (
        "paged attention, three steps in place",
        "only the written rows of the cache change",
        "a second start compiles nothing",
        "collective of 2 cores",
        "probe: StableHLO as input",
    ):
        assert told[check].startswith("proven"), (check, told[check])
    assert "emulator" in told["runtime"] and "fake_neuronx_cc" in told["compiler, not a stub"]
    operators = told["Octavo's operators are in the compiler's list"]
    assert "3 operators, without all-gather" in operators
    # What the emulator cannot tell it does not pretend to: it loads whatever the fake wrapped.
    assert told["a NEFF for other hardware is refused"].startswith("failed, not needed")
    assert told["collective of 12 cores"].startswith("not applicable")
