"""A fake neuronx-cc for every test that asks for one."""

import sys
from pathlib import Path

import pytest

from octavo.backends.neuron.compiler import Compiler

FAKE = (sys.executable, "-S", str(Path(__file__).parent / "fake_neuronx_cc.py"))


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file in which the fake compiler notes its calls."""
    path = tmp_path / "calls"
    path.touch()
    monkeypatch.setenv("FAKE_NEURONX_CC_CALLS", str(path))
    return path


@pytest.fixture
def fake() -> Compiler:
    """A Compiler that runs the fake neuronx-cc."""
    return Compiler(FAKE, "fake-1", time_limit=20, jobs=2)
