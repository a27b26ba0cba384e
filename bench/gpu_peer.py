"""Another engine on the same workloads: vLLM, from a folder where it was unpacked.

It runs in a process of its own, before ours takes the device's memory:

    PYTHONPATH=FOLDER python -m octavo.bench.gpu_peer SHAPE ROUNDS WORKLOAD...

which prints one JSON line for its start and one for each workload.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from octavo.bench.workloads import Workload, make
from octavo.engine.config import ConfigError

NAME = "vllm"
SEQUENCES = 256  # decoded together at most, as ours
LONGEST = 4096
# Rounds before the one of single_stream that counts: our programs' second run still records graphs.
WARM = 2
# It runs from a folder, without a network; its own sampler would be compiled at the first start.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
}


@dataclass
class Measured:
    """What the other engine took."""

    version: str = ""
    startup: float = 0.0  # seconds from import to ready
    seconds: dict[str, list[float]] = field(default_factory=dict)  # by workload, one a round


def measure(
    folder: str, shape: str, names: Sequence[str], rounds: int, seconds: float = 1200.0
) -> Measured:
    """Run it. Raises ConfigError with the last thing it said where it does not finish."""
    if not (Path(folder) / NAME).is_dir():
        raise ConfigError(
            f"there is no {NAME} in {folder}",
            f"--peer takes the folder that holds the package `{NAME}` and what it imports",
        )
    paths = [folder, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", "octavo.bench.gpu_peer", shape, str(rounds), *names]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        raise ConfigError(f"{NAME} did not finish within {seconds:.0f} s") from None
    measured = read(done.stdout)
    if done.returncode or len(measured.seconds) != len(names):
        said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise ConfigError(f"{NAME} ended with exit code {done.returncode}: {said}")
    return measured


def read(output: str) -> Measured:
    """What its process printed; lines that are not ours are its own log."""
    out = Measured()
    for line in output.splitlines():
        if not line.startswith('{"peer"'):
            continue
        record = json.loads(line)
        if "workload" in record:
            out.seconds[record["workload"]] = record["seconds"]
        else:
            out.version, out.startup = record["version"], record["startup"]
    return out


def main() -> None:
    """Run the engine here, with random weights of the shape."""
    began = time.perf_counter()
    vllm: Any = import_module(NAME)
    shape, rounds, *names = sys.argv[1:]
    vocab = json.loads((Path(shape) / "config.json").read_text())["vocab_size"]
    llm = vllm.LLM(
        model=shape,
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=LONGEST,
        max_num_seqs=SEQUENCES,
        gpu_memory_utilization=0.9,
        enable_prefix_caching=False,
        disable_log_stats=True,
    )
    _say(version=vllm.__version__, startup=time.perf_counter() - began)
    drive(vllm, llm, make("decode_heavy", vocab), shorten=16)  # warm
    for name in names:
        load = make(name, vocab)
        if name == "single_stream":
            for _ in range(WARM):
                drive(vllm, llm, load)
        _say(workload=name, seconds=[drive(vllm, llm, load) for _ in range(int(rounds))])


def _say(**record: Any) -> None:
    print(json.dumps({"peer": NAME, **record}), flush=True)


def drive(vllm: Any, llm: Any, load: Workload, shorten: int = 0) -> float:
    """Seconds from the first request to the last token."""
    prompts = [{"prompt_token_ids": ids} for ids in load.prompts]
    each = [
        vllm.SamplingParams(
            temperature=0.0, max_tokens=shorten or count, ignore_eos=True, detokenize=False
        )
        for count in load.outputs
    ]
    began = time.perf_counter()
    results = llm.generate(prompts, each, use_tqdm=False)
    seconds = time.perf_counter() - began
    got = sum(len(result.outputs[0].token_ids) for result in results)
    assert got == (shorten * len(load.prompts) or load.tokens_out), f"{got=}"
    return seconds


if __name__ == "__main__":
    main()
