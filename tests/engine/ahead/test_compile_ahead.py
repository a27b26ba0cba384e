"""Whole models compiled for TPUs that are not here (make aot): what their programs hold."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from octavo.bench.tpu_compile import NO_LIBTPU, libtpu_version
from tests.engine.ahead.test_plan import LLAMA

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(libtpu_version() is None, reason=NO_LIBTPU),
]
SHAPES = Path(__file__).parents[2] / "models" / "shapes"
QWEN = json.loads((SHAPES / "qwen3-30b-a3b.json").read_text())
LAYERS = 32 if os.environ.get("OCTAVO_AOT_FULL") else 4  # a loop: compiled alike, but for its sizes
WORDS = ("--max-num-seqs", "16", "--max-model-len", "2048", "--max-num-batched-tokens", "128")


def compiled(config: dict, target: str, folder: Path) -> dict:
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": LAYERS}))
    words = ["compile", str(folder), "--target", target, "--output", str(folder / "out"), *WORDS]
    command = [sys.executable, "-m", "octavo", *words, "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((folder / "out" / "report.json").read_text()) == json.loads(done.stdout)
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    "config, target",
    [(LLAMA, "v6e:1x1"), (LLAMA, "tpu7x:1x1x1"), (LLAMA, "v5e:2x2"), (QWEN, "v6e:2x2")],
    ids=lambda given: given if isinstance(given, str) else given["architectures"][0],
)
def test_a_decode_step_is_one_program_that_copies_no_weight_and_no_cache(
    config: dict, target: str, tmp_path: Path
) -> None:
    report = compiled(config, target, tmp_path)
    programs = {program["name"]: program for program in report["programs"]}
    step = programs["greedy step of 16 rows"]
    # Experts and norms of queries and keys make one more than aimed at.
    assert step["arguments"] <= (26 if config is QWEN else 25)
    experts = {"tpu_grouped": 2} if config is QWEN else {}
    assert step["kernels"] == {"tpu_decode": 1} | experts, "one loop over all layers"
    for name, program in programs.items():
        if name.startswith(("greedy", "plain", "forward")):
            assert program["copies"] == {}, name
            assert program["argument_bytes"] + program["temporary_bytes"] < report["chip"]["memory"]
    # After attention and after the feed-forward part, and nowhere else.
    sums = 0 if target == "v6e:1x1" else 2
    assert sum(step["collectives_per_layer"].values()) == sums
    kept = {path.name.rpartition("-")[0] for path in (tmp_path / "out" / "whole").iterdir()}
    assert {name.replace(" ", "-") for name in programs} <= kept
