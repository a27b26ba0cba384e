"""How long until the engine is ready, with an empty and with a filled compilation cache.

Each sample is a process of its own. The first starts with an empty cache folder, the others find
what it left.

example:
  octavo bench startup smollm2-135m
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from typing import Any

from octavo.bench.common import Row, Spread, report
from octavo.cli.options import add_config_flags, config_from_args
from octavo.engine.config import ConfigError

_CHILD = """
import json, sys, time
started = time.perf_counter()
import octavo
make = octavo.LLM
imported = time.perf_counter()
llm = make(**json.loads(sys.argv[1]))
ready = time.perf_counter()
one = octavo.SamplingParams(max_tokens=1)
llm.generate([{"prompt_token_ids": [11, 12, 13]}], one, use_tqdm=False)
first = time.perf_counter()
llm.close()
times = [imported - started, ready - imported, first - ready, first - started]
print("seconds:" + json.dumps(times))
"""
QUANTITIES = ("import s", "ready s", "first token s", "in all s")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The engine's flags."""
    add_config_flags(parser)
    parser.add_argument(
        "--rounds", type=int, default=3, metavar="N", help="starts with a filled cache (default: 3)"
    )


def run(args: argparse.Namespace) -> int:
    """Measure and print."""
    config = config_from_args(args)
    with tempfile.TemporaryDirectory(prefix="octavo-cache-") as folder:
        values = asdict(replace(config, compilation_cache=folder))
        cold = [start(values)]
        warm = [start(values) for _ in range(args.rounds)]
    rows = [
        Row(case, name, Spread.of([sample[i] for sample in samples]), 2)
        for case, samples in (("cold", cold), ("warm", warm))
        for i, name in enumerate(QUANTITIES)
        if samples
    ]
    return report("startup", {"model": config.model, **config.overrides()}, rows, args)


def start(values: dict[str, Any]) -> list[float]:
    """The seconds of one start, in a process of its own, in the order of QUANTITIES."""
    # jax's own variable would win over the folder that this measurement brings.
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    command = [sys.executable, "-c", _CHILD, json.dumps(values)]
    child = subprocess.run(command, capture_output=True, text=True, env=environment)
    for line in child.stdout.splitlines():
        if line.startswith("seconds:"):
            return list(json.loads(line.removeprefix("seconds:")))
    last = (child.stderr.strip().splitlines() or ["no output"])[-1]
    raise ConfigError(f"the engine did not start: {last}", "octavo doctor checks this machine")
