"""Whole models of full depth compiled for TPUs that are not here (make aot): every program of an
engine of 64 rows and sequences of 4,096 tokens, and what it holds, copies and sends."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from octavo.engine.ahead.schedule import NO_LIBTPU, libtpu_version
from tests.engine.ahead.test_plan import LLAMA

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(libtpu_version() is None, reason=NO_LIBTPU),
]
SHAPES = Path(__file__).parents[2] / "models" / "shapes"
QWEN = json.loads((SHAPES / "qwen3-30b-a3b.json").read_text())
WORDS = ("--max-num-seqs", "64", "--max-model-len", "4096")
ARGUMENTS = 25  # of a decode step, at most: the host pays for each at every dispatch
MOST_PADDING = 1024  # rows that 32 chunks of a prompt add to its tokens, and more
GiB = 1 << 30


def compiled(config: dict, target: str, folder: Path) -> dict:
    (folder / "config.json").write_text(json.dumps(config))
    words = ["compile", str(folder), "--target", target, "--output", str(folder / "out"), *WORDS]
    command = [sys.executable, "-m", "octavo", *words, "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((folder / "out" / "report.json").read_text()) == json.loads(done.stdout)
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    "config, target",
    [
        (LLAMA, "v6e:1x1"),
        (LLAMA, "v5e:2x2"),
        (LLAMA, "v6e:2x2"),
        (LLAMA, "tpu7x:1x1x1"),
        (QWEN, "v6e:2x2"),
    ],
    ids=lambda given: given if isinstance(given, str) else given["architectures"][0],
)
def test_every_program_fits_the_chip_and_copies_no_weight_and_no_cache(
    config: dict, target: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    began = time.monotonic()
    report = compiled(config, target, tmp_path)
    programs = {program["name"]: program for program in report["programs"]}
    rows, tokens = report["row_buckets"], report["token_buckets"]
    steps = [f"{kind} step of {r} rows" for r in rows for kind in ("greedy", "plain")]
    forwards = [f"forward {r} rows + 0 tokens" for r in rows]
    prompts = [f"forward {rows[-1]} rows + {t} tokens" for t in tokens]
    assert {*steps, *forwards, *prompts} <= programs.keys(), "every bucket has its programs"
    # After attention and after the feed-forward part, and nowhere else.
    sent = {} if target == "v6e:1x1" else {"all-reduce": 2}
    for name in (*steps, *forwards, *prompts):
        program = programs[name]
        kernels = {"tpu_decode": 1}
        kernels |= {"tpu_write": 1, "tpu_prefill": 1} if name in prompts else {}
        kernels |= {"tpu_grouped": 2} if config is QWEN else {}
        assert program["kernels"] == kernels, f"{name}: one loop over all layers"
        assert not [shape for shape in program["copies"] if kept(shape, program)], name
        assert program["collectives_per_layer"] == sent, name
    for name, program in programs.items():
        held = program["argument_bytes"] + program["temporary_bytes"]
        assert held < report["chip"]["memory"], name
    assert max(programs[name]["arguments"] for name in steps) <= ARGUMENTS
    assert 0 < report["attention"]["decode"] < report["attention"]["copies"]
    stored = {path.name.rpartition("-")[0] for path in (tmp_path / "out" / "whole").iterdir()}
    assert {name.replace(" ", "-") for name in programs} <= stored
    with capfd.disabled():
        print(f"\n{config['architectures'][0]} {target}: {line(report)}", end="")
        print(f", {time.monotonic() - began:,.0f} s", flush=True)


def kept(shape: str, program: dict) -> bool:
    """Whether an array that is copied can be of weights or of the cache, or a part of either.

    Not if it has another dtype than those have, as logits and counts; nor if it has a row for every
    token of a prompt, of which each chunk begins at a whole tile: those pass through once.
    """
    kind, first = re.match(r"(\w+)\[(\d+)", shape).groups()
    prompt = re.search(r"(\d+) tokens", program["name"])
    tokens = int(prompt[1]) if prompt else 0
    return kind == "bf16" and not (tokens and tokens <= int(first) <= tokens + MOST_PADDING)


def line(report: dict) -> str:
    """What the table in bench/tpu-notes.md says of a model."""
    memory, programs = report["memory"], {p["name"]: p for p in report["programs"]}
    most, step = report["row_buckets"][-1], report["decode"][-1]
    greedy, plain = (programs[f"{kind} step of {most} rows"] for kind in ("greedy", "plain"))
    temporary = max(program["temporary_bytes"] for program in programs.values())
    held = ", ".join(f"{n / GiB:.2f}" for n in (memory["weights"], memory["cache"], temporary))
    sent = [greedy[what] or "nothing" for what in ("collectives_per_layer", "collectives")]
    return (
        f"{len(programs)} programs; weights, cache, temporary {held} GiB; arguments "
        f"{greedy['arguments']} greedy, {plain['arguments']} plain; a layer sends {sent[0]}, a "
        f"step with the loop once {sent[1]}; {step['rows']} x {step['length']:,} tokens: cycles "
        f"{step['cycles']:,} and {step['attention_cycles']:,} of attention, "
        f"bound {step['seconds'] * 1e3:.2f} ms"
    )
