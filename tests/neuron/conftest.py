"""A fake neuronx-cc for every test that asks for one."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from octavo.backends.neuron.compiler import Compiler
from tests.neuron.emulator.host import Emulator, attach, build

FAKE = (sys.executable, "-S", str(Path(__file__).parent / "fake_neuronx_cc.py"))


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file in which the fake compiler notes its calls."""
    path = tmp_path / "calls"
    path.touch()
    monkeypatch.setenv("FAKE_NEURONX_CC_CALLS", str(path))
    return path


@pytest.fixture(scope="session")
def fake() -> Compiler:
    """A Compiler that runs the fake neuronx-cc."""
    return Compiler(FAKE, "fake-1", time_limit=20, jobs=2)


@pytest.fixture(scope="session")
def emulator_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The emulator of libnrt, built for these tests."""
    library = build(tmp_path_factory.mktemp("emulator"))
    if library is None:
        pytest.skip("the emulator of libnrt is built with gcc, which is not here")
    return library


@pytest.fixture
def emulator(emulator_library: Path) -> Iterator[Emulator]:
    """The emulator as an instance with two cores; whoever uses it leaves nothing behind."""
    emulator = attach(str(emulator_library))
    emulator.become()
    before = emulator.counts()
    yield emulator
    assert emulator.counts() == before, "tensors, sets and models that nobody freed"
