"""A mesh of devices beside one of them: the same tokens, how much faster, and what it costs.

examples:
  octavo bench mesh --model shapes/llama31_8b --mesh model=2
  octavo bench mesh --model shapes/llama31_8b --mesh model=2 --truth gemma3-270m
  octavo bench mesh --model shapes/llama31_8b --mesh model=2 --truth gemma3-270m decode_heavy

Each engine is a process of its own, one after the other, with random weights of the shape. --truth
names a model with real weights, whose greedy tokens in float32 with exact products must be the same
on the mesh as on one device. Where jax's profiler sees kernels, the share of collectives is told.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from octavo.bench import gpu
from octavo.bench.common import Row, Spread, report
from octavo.bench.workloads import NAMES, make
from octavo.cli.options import add_config_flags, config_from_args
from octavo.engine.config import ConfigError

WORKLOADS = ("single_stream", "decode_heavy")
# XLA names a kernel of its own after jax's operation: psum, pmax, pmin.
COLLECTIVE = re.compile(r"nccl|psum|pm(ax|in)|all.?(reduce|gather|to.?all)|scatter|permute", re.I)
PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n",
    "Water boils at",
)
TOKENS = 64
FOUND = '{"mesh"'  # how a line of a child's output begins that is for us


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The shape, the mesh, and which workloads."""
    parser.add_argument("workloads", nargs="*", help=f"{' and '.join(WORKLOADS)} by default")
    parser.add_argument("--truth", default="", metavar="MODEL", help="compare this one's tokens")
    parser.add_argument("--kernels", action="store_true", help="and which kernels take the time")
    parser.add_argument("--part", default="", choices=("one", "mesh"), help=argparse.SUPPRESS)
    parser.usage = "%(prog)s [WORKLOAD ...] --model SHAPE --mesh AXES [flags]"
    add_config_flags(parser, positional_model=False)
    parser.set_defaults(load_format="dummy", max_model_len=4096, enable_prefix_caching=False)


def run(args: argparse.Namespace) -> int:
    """Measure and print; 1 where tokens differ."""
    names = tuple(args.workloads) or WORKLOADS
    for name in names:
        if name not in NAMES:
            raise ConfigError(f"there is no workload `{name}`", f"there are {', '.join(NAMES)}")
    if not args.mesh:
        raise ConfigError("`octavo bench mesh` compares a mesh", "give --mesh, as model=2")
    if args.part:
        return part(args, names)
    one, many = (child(kind) for kind in ("one", "mesh"))
    rows = [Row("start", f"s, {k}", Spread.of([x["start"]])) for k, x in both(one, many)]
    for name in names:
        rows += beside(name, make(name, one["vocab"]).tokens_out, one, many)
    wrong = 0
    for prompt, alone, together in zip(PROMPTS, one["tokens"], many["tokens"], strict=False):
        same = next((i for i, (a, b) in enumerate(zip(alone, together)) if a != b), len(alone))
        wrong += alone != together
        case = f"{args.truth}: {prompt[:16].strip()!r}"
        rows.append(Row(case, f"equal tokens of {len(alone)}", Spread.of([same]), 0))
    report("mesh", {"mesh": args.mesh, "device": one["device"]}, rows, args)
    return int(wrong > 0)


def both(one: Any, many: Any) -> tuple[tuple[str, Any], tuple[str, Any]]:
    """With their names in the table."""
    return ("one device", one), ("mesh", many)


def beside(name: str, tokens: int, one: Any, many: Any) -> list[Row]:
    """The lines of one workload."""
    rows, single = [], name == "single_stream"
    for kind, found in both(one, many):
        seconds = found["seconds"][name]
        value = 1e3 * seconds / tokens if single else tokens / seconds
        quantity = "ms a token" if single else "out tok/s"
        rows.append(Row(name, f"{quantity}, {kind}", Spread.of([value]), 2 if single else 0))
    ratio = many["seconds"][name] / one["seconds"][name]
    label = "of one device's time" if single else "times one device"
    rows.append(Row(name, label, Spread.of([ratio if single else 1 / ratio]), 2))
    if (share := many["collectives"].get(name)) is not None:
        rows.append(Row(name, "% of the step in collectives", Spread.of([100 * share])))
    return rows


def child(kind: str) -> Any:
    """Run this very command again as one of the two engines."""
    words = [*sys.argv[1:], "--part", kind]
    done = subprocess.run([sys.executable, "-m", "octavo", *words], stdout=subprocess.PIPE)
    lines = done.stdout.decode().splitlines()
    print(*(line for line in lines if not line.startswith(FOUND)), sep="\n", flush=True)
    found = [line for line in lines if line.startswith(FOUND)]
    if done.returncode or not found:
        raise ConfigError(f"the engine on {kind} ended with exit code {done.returncode}")
    return json.loads(found[-1])


def part(args: argparse.Namespace, names: tuple[str, ...]) -> int:
    """One engine: what it took, as one line of JSON."""
    config = config_from_args(args)
    if args.part == "one":
        config = replace(config, mesh="")
    tokens = truth(args.truth, config) if args.truth else []
    began = time.perf_counter()
    core = import_module("octavo.engine.core").EngineCore(config)
    start = time.perf_counter() - began
    print(*core.summary(), sep="\n", flush=True)
    vocab = core.resolved.dims.vocab
    gpu.drive(core, make("decode_heavy", vocab), shorten=16)  # warm
    seconds, collectives = {}, {}
    for name in names:
        load = make(name, vocab)
        if name == "single_stream":
            gpu.drive(core, load)
        seconds[name] = gpu.drive(core, load)
        collectives[name] = share(core, load, args.kernels)
    device = import_module("jax").devices()[0].device_kind
    found = {"mesh": args.part, "start": start, "seconds": seconds, "collectives": collectives}
    print(json.dumps({**found, "tokens": tokens, "vocab": vocab, "device": device}), flush=True)
    core.close()
    return 0


def truth(model: str, config: Any) -> list[list[int]]:
    """Greedy tokens of real weights in float32."""
    octavo, jax = import_module("octavo"), import_module("jax")
    jax.config.update("jax_default_matmul_precision", "highest")
    settings = {"dtype": "float32", "max_model_len": 256, "max_num_seqs": 8, "quiet": True}
    settings |= {"max_num_batched_tokens": 128, "num_pages": 64, "mesh": config.mesh}
    with octavo.LLM(model, **settings) as llm:
        params = octavo.SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
        answers = llm.generate(list(PROMPTS), params, use_tqdm=False)
    jax.config.update("jax_default_matmul_precision", None)
    import_module("gc").collect()  # the next engine takes the device's memory
    return [list(answer.outputs[0].token_ids) for answer in answers]


def share(core: Any, load: Any, show: bool) -> float | None:
    """The part of the time in the middle of a workload that the first device spends in
    collectives; None where the profiler sees no kernels."""
    gpu.submit(core, load)

    got = 0
    while 2 * got < load.tokens_out:
        got += gpu.turn(core)

    def turns() -> None:
        for _ in range(8):
            core.turn()

    events = traced(turns)
    core.abort([i + 1 for i in range(len(load.prompts))])
    core.drain()
    if not events:
        return None
    if show:
        import_module("octavo.bench.gpu_kernels").print_kernels(events, 25)
    span = max(begin + length for _, begin, length in events) - events[0][1]
    return sum(length for name, _, length in events if COLLECTIVE.search(name)) / span


def traced(work: Callable[[], None]) -> list[tuple[str, float, float]]:
    """The kernels of the first device while `work` runs."""
    jax = import_module("jax")
    kernels = import_module("octavo.bench.gpu_kernels").kernels
    with tempfile.TemporaryDirectory(prefix="octavo-trace-") as folder:
        with jax.profiler.trace(folder):
            work()
        files = sorted(Path(folder).rglob("*.xplane.pb"))
        data = jax.profiler.ProfileData.from_file(str(files[-1])) if files else None
    found: list[tuple[str, float, float]] = kernels(data) if data else []
    return found
