"""`octavo doctor neuron`: honest where there is nothing; every check runs, on the emulator."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OPERATORS = "Octavo's operators are in the compiler's list"
ATTENTION = "paged attention, three steps in place"
WRITTEN = "only the written rows of the cache change"
DONATED = "jax's plugin updates donated arrays in place"
PIN = "jax's plugin, and a jax it was made for"
# What only a device can answer, and the checks that ask it.
QUESTIONS = {
    "every operator that graphs may have is one of the compiler's": {OPERATORS},
    "its list of operators is newer than the documented one": {OPERATORS},
    "a decode step compiles, runs, and is the host's within a tolerance": {ATTENTION},
    "the runtime updates aliased tensors in place": {ATTENTION, WRITTEN},
    "an idle row writes to the trash page and nowhere else": {WRITTEN},
    "jax's plugin donates rightly, with no logical cores asked for": {DONATED},
    "the plugin's pin of jax": {PIN},
    "ids have to be made small": {"probe: 64-bit ids as jax writes them"},
    "calls have to be flattened": {"probe: calls as jax writes them"},
    "replica groups have to be written": {"probe: ranks of a collective as jax lists them"},
    "top-k has to be avoided": {"probe: top-k as jax writes it"},
    "`and` and `or` have to be avoided": {"probe: reduce by `and`", "probe: reduce by `or`"},
    "StableHLO is read": {"probe: StableHLO as input"},
    "AWS's kernels can be called": {"probe: AWS's kernel language"},
    "two ranks of one module meet, each loaded with its rank": {"collective of 2 cores"},
    "twelve cores are linked": {"collective of 12 cores"},
    "inputs and outputs have the names that the exporter asks for": {
        "inputs and outputs go by Octavo's names"
    },
    "a gather of pages is fast": {"speed of gathered pages"},
    "what was compiled is found again": {"a second start compiles nothing"},
    "a NEFF for another target is refused": {"a NEFF for other hardware is refused"},
}


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
    assert told[ATTENTION].startswith("not applicable")
    assert not any(line.startswith("proven") for line in told.values())


def test_every_check_of_the_doctor_runs_on_the_emulator(emulator_library, tmp_path) -> None:
    code, told = doctor(
        OCTAVO_NEURON_LIBNRT=str(emulator_library),
        OCTAVO_NEURON_COMPILER=str(ROOT / "tests" / "neuron" / "fake_neuronx_cc.py"),
        OCTAVO_NEURON_CACHE=str(tmp_path / "neffs"),
        XLA_FLAGS="--xla_force_host_platform_device_count=2",
    )
    assert code == 0, told
    for question, asked in QUESTIONS.items():
        assert asked <= set(told), question
    about_the_machine = {"devices", "runtime", "compiler, not a stub"}
    assert set().union(*QUESTIONS.values()) | about_the_machine == set(told)
    not_proven = {check for check, line in told.items() if not line.startswith("proven")}
    assert not_proven == {
        OPERATORS,
        DONATED,
        PIN,
        "a NEFF for other hardware is refused",
        "collective of 12 cores",
        "probe: AWS's kernel language",
    }
    assert "emulator" in told["runtime"] and "fake_neuronx_cc" in told["compiler, not a stub"]
    assert "3 operators, without all-gather" in told[OPERATORS]
    # What the emulator cannot tell it does not pretend to: it loads whatever the fake wrapped.
    assert told["a NEFF for other hardware is refused"].startswith("failed, not needed")
    assert told["collective of 12 cores"].startswith("not applicable")
