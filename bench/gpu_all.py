"""Everything that is to be measured on one NVIDIA GPU, in one command, the most wanted first.

    python -m octavo.bench.gpu_all --shapes FOLDER [--weights FILE] [--seconds 590] [--only 'a; b']
    python -m octavo.bench.gpu_all --list

FOLDER holds llama31_8b and qwen3_0_6b (a config.json each), FILE is SmolLM2-135M as GGUF. Each step
is a process of its own, prints as it goes, and is ended where it takes twice what is expected; one
that no longer fits into the time is named and left out. With --cache the compiled programs are kept
in that folder, so that a later step starts as a second start would.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Step:
    """One process."""

    name: str
    seconds: int  # expected
    words: tuple[str, ...]  # behind `python -m`; {8b}, {0.6b}, {weights} and {cache} are filled in
    choices: str = ""  # OCTAVO_GPU
    needs: str = ""  # an option of this program without which it is left out
    environment: dict[str, str] = field(default_factory=dict)


def _engine(shape: str, *words: str) -> tuple[str, ...]:
    return (
        "octavo",
        "bench",
        "gpu",
        "--model",
        shape,
        "--compilation-cache",
        "{cache}",
        *words,
    )


ATTENTION = ("octavo.bench.gpu_attention", "--variants")
APART = "gated_from=1000000"
TRITON = "least_rows=1000000"  # decode of more than 128 rows as that of fewer
START = ("octavo", "bench", "startup", "{0.6b}", "--load-format", "dummy", "--rounds", "0")
STEPS = (
    Step("golden", 40, ("octavo", "bench", "golden", "{weights}"), needs="weights"),
    Step("8B", 90, _engine("{8b}", "--steps")),
    Step("8B, decode by Triton", 70, _engine("{8b}", "decode_heavy", "chat_mix"), TRITON),
    Step("0.6B", 75, _engine("{0.6b}", "--steps")),
    Step("0.6B, decode by Triton", 70, _engine("{0.6b}"), TRITON),
    Step("decode variants", 60, (*ATTENTION, "--only", "decode")),
    Step("start", 65, START),
    Step("products", 60, ("octavo.bench.gpu_matmul",)),
    Step("attention, both page sizes", 60, ("octavo.bench.gpu_attention",)),
    Step("8B, gate and up apart", 70, _engine("{8b}", "prefill_heavy", "decode_heavy"), APART),
    Step("0.6B, gate and up apart", 60, _engine("{0.6b}", "prefill_heavy", "decode_heavy"), APART),
    Step("graphs", 20, ("octavo.bench.gpu_graphs",)),
    Step("prefill variants", 45, (*ATTENTION, "--only", "prefill")),
    Step("8B again, from caches", 20, _engine("{8b}", "single_stream")),
    Step("0.6B again, from caches", 10, _engine("{0.6b}", "single_stream")),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", default="", help="the folder of both shapes")
    parser.add_argument("--weights", default="", help="SmolLM2-135M-Instruct as a GGUF file")
    parser.add_argument("--cache", default="", help="a folder for compiled programs")
    parser.add_argument("--seconds", type=float, default=590, help="for all of it")
    parser.add_argument("--only", default="", help="names of steps, with semicolons between")
    parser.add_argument("--list", action="store_true", help="name the steps and their seconds")
    options = parser.parse_args()
    named = [name.strip() for name in options.only.split(";") if name.strip()]
    steps = chosen(STEPS, named)
    if options.list:
        print(*(f"{step.seconds:>4} s  {step.name}" for step in steps), sep="\n")
        return 0
    with tempfile.TemporaryDirectory(prefix="octavo-gpu-all-") as folder:
        places = {
            "8b": str(Path(options.shapes) / "llama31_8b"),
            "0.6b": str(Path(options.shapes) / "qwen3_0_6b"),
            "weights": options.weights,
            "cache": options.cache or folder,
        }
        return run(steps, places, time.monotonic() + options.seconds)


def chosen(steps: tuple[Step, ...], names: list[str]) -> list[Step]:
    """The steps of these names in their order; all without names. SystemExit for another name."""
    for name in names:
        if name not in {step.name for step in steps}:
            raise SystemExit(f"there is no step `{name}`; --list names them")
    return [step for step in steps if not names or step.name in names]


def run(steps: list[Step], places: dict[str, str], end: float) -> int:
    """Run what fits before `end`, of time.monotonic; how many steps failed."""
    failed = 0
    for step in steps:
        left = end - time.monotonic()
        if step.needs and not places[step.needs]:
            _say(f"{step.name}: left out, --{step.needs} is not given")
        elif left < step.seconds / 2:
            _say(f"{step.name}: left out, {left:.0f} s are left of {step.seconds} expected")
        else:
            failed += not _one(step, places, min(left, 2 * step.seconds))
    return failed


def _one(step: Step, places: dict[str, str], most: float) -> bool:
    words = [word.format(**places) if "{" in word else word for word in step.words]
    environment = {**os.environ, **step.environment}
    if step.choices:
        environment["OCTAVO_GPU"] = step.choices
    _say(f"{step.name}: {step.seconds} s expected{', ' + step.choices if step.choices else ''}")
    began = time.monotonic()
    try:
        code = subprocess.run(
            [sys.executable, "-u", "-m", *words], env=environment, timeout=most
        ).returncode
    except subprocess.TimeoutExpired:
        code = -1
    took = time.monotonic() - began
    _say(f"{step.name}: {'done' if code == 0 else f'ended with {code}'} in {took:.0f} s")
    return code == 0


def _say(text: str) -> None:
    print(f"## {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
