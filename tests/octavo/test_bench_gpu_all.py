"""Everything for one GPU in one command: what is run, left out and ended; and golden verdicts."""

import time
from pathlib import Path

import pytest

from octavo.bench.golden import verdict
from octavo.bench.gpu_all import STEPS, Step, chosen, run

PLACES = {"8b": "", "0.6b": "", "weights": "", "cache": ""}


def test_steps_run_until_the_time_is_up(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hello.py").write_text("import os; print('hello', os.environ['OCTAVO_GPU'])")
    (tmp_path / "hang.py").write_text("import time; time.sleep(60)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    steps = [
        Step("said", 1, ("hello",), "packed=8"),
        Step("weighed", 1, ("hello",), needs="weights"),
        Step("hung", 1, ("hang",)),
        Step("too long", 600, ("hello",)),
    ]
    assert run(steps, PLACES, time.monotonic() + 30) == 1
    out = capfd.readouterr().out
    assert "hello packed=8" in out and "## said: done" in out
    assert "weighed: left out, --weights is not given" in out
    assert "hung: ended with -1 in 2 s" in out and "too long: left out" in out


def test_every_step_can_be_named_and_no_other() -> None:
    assert chosen(STEPS, ["8B"]) == [step for step in STEPS if step.name == "8B"]
    with pytest.raises(SystemExit, match="there is no step `9B`"):
        chosen(STEPS, ["9B"])


def test_a_golden_verdict_counts_equal_tokens_and_weighs_the_first_other() -> None:
    tops = [{1: -0.1, 7: -2.0}, {5: -0.50, 2: -0.52}, {3: -0.1, 9: -4.0}]
    assert verdict([1, 2, 3], [1, 2, 3], tops) == (3, 0.0)
    same, gap = verdict([1, 2, 3], [1, 5, 3], tops)
    assert same == 1 and gap == pytest.approx(0.02)
    assert verdict([1, 2, 3], [1, 2, 8], [{1: 0.0}, {2: 0.0}, {8: -0.1, 9: -3.0}])[1] == float(
        "inf"
    )
    assert verdict([1, 2, 3], [1, 2], tops) == (2, float("inf"))
