"""The engine on one accelerator: random weights of a real model's shape, four workloads.

examples:
  octavo bench gpu --model shapes/llama31_8b single_stream decode_heavy
  octavo bench gpu --model shapes/llama31_8b --steps --kernels
  octavo bench gpu --model shapes/llama31_8b prefill_heavy --budgets 2048,4096
  octavo bench gpu --model shapes/llama31_8b --peer /opt/vllm
"""

import argparse
import time
from dataclasses import replace
from importlib import import_module
from typing import Any

from octavo.bench import gpu_peer
from octavo.bench.common import Row, Spread, report
from octavo.bench.gpu_steps import Steps, print_builds, time_programs
from octavo.bench.workloads import NAMES, Workload, make
from octavo.cli.options import add_config_flags, config_from_args
from octavo.engine.config import ConfigError


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The shape, and which workloads."""
    parser.add_argument("workloads", nargs="*", help=f"any of {', '.join(NAMES)}; all by default")
    parser.add_argument("--rounds", type=int, default=1, help="times each workload is run")
    parser.add_argument("--steps", action="store_true", help="tell where the time of a step goes")
    parser.add_argument(
        "--budgets",
        default="",
        metavar="N,N",
        help="also run prefill_heavy with at most so many prompt tokens a step",
    )
    parser.add_argument("--kernels", action="store_true", help="and which kernels take it")
    parser.add_argument(
        "--peer", default="", metavar="FOLDER", help="also run the vLLM that lies unpacked there"
    )
    parser.usage = "%(prog)s [WORKLOAD ...] --model SHAPE [flags]"
    add_config_flags(parser, positional_model=False)
    parser.set_defaults(load_format="dummy", max_model_len=4096, enable_prefix_caching=False)


def run(args: argparse.Namespace) -> int:
    """Measure and print."""
    names = args.workloads or list(NAMES)
    for name in names:
        if name not in NAMES:
            raise ConfigError(f"there is no workload `{name}`", f"there are {', '.join(NAMES)}")
    config, peer = config_from_args(args), None
    if args.peer:  # first, because ours keeps the device's memory until its process ends
        peer = gpu_peer.measure(args.peer, config.model, names, args.rounds)
        print(f"{gpu_peer.NAME} {peer.version} was ready in {peer.startup:.1f} s", flush=True)
    began = time.perf_counter()
    core = import_module("octavo.engine.core").EngineCore(config)
    startup = time.perf_counter() - began
    print(*core.summary(), sep="\n", flush=True)
    if args.steps:
        print_builds(core)
        time_programs(core)
    rows = compare("start", "s", 1, [startup], [peer.startup] if peer else [])
    vocab = core.resolved.dims.vocab
    drive(core, make("decode_heavy", vocab), shorten=16)  # warm
    for name in names:
        load = make(name, vocab)
        if name == "single_stream":
            for _ in range(gpu_peer.WARM):
                drive(core, load)
        rows += results(load, timed(core, load, args), peer.seconds[name] if peer else [])
    for budget in filter(None, args.budgets.split(",")):
        rows += budgeted(core, int(budget), args)
    stats = core.stats()
    facts = {"stalls": stats.stalls, "compiles": stats.compiles_after_ready, "steps": stats.steps}
    facts["host us/step"] = round(1e6 * stats.host_seconds / max(1, stats.steps))
    core.close()
    return report("gpu", facts, rows, args)


def timed(core: Any, load: Workload, args: argparse.Namespace) -> list[float]:
    """The seconds of each round, with what else was asked for printed."""
    steps = Steps()
    with steps.watch(core):
        seconds = [drive(core, load) for _ in range(args.rounds)]
    if args.steps:
        print(f"\n{load.name}: {', '.join(f'{s:.2f}' for s in seconds)} s")
        steps.print()
    if args.kernels:
        examine(core, load)
    return seconds


def budgeted(core: Any, budget: int, args: argparse.Namespace) -> list[Row]:
    """prefill_heavy in smaller steps, with the programs that are there."""
    limits = core.host.limits
    buckets = tuple(n for n in limits.token_buckets if n <= budget) or limits.token_buckets[:1]
    core.host.limits = replace(limits, token_buckets=buckets)
    load = make("prefill_heavy", core.resolved.dims.vocab)
    load = replace(load, name=f"prefill_heavy, {buckets[-1]} a step")
    rows = results(load, timed(core, load, args), [])
    core.host.limits = limits
    return rows


def results(load: Workload, ours: list[float], theirs: list[float]) -> list[Row]:
    """The lines of one workload, from the seconds of its rounds."""
    out, both = load.tokens_out, load.tokens_in + load.tokens_out

    def rate(tokens: int, seconds: list[float]) -> list[float]:
        return [tokens / s for s in seconds]

    if load.name == "single_stream":
        each = [[1e3 * s / out for s in seconds] for seconds in (ours, theirs)]
        return compare(load.name, "ms a token", 2, *each)
    rows = compare(load.name, "out tok/s", 0, rate(out, ours), rate(out, theirs))
    return rows + compare(load.name, "in+out tok/s", 0, rate(both, ours), rate(both, theirs))


def compare(
    case: str, quantity: str, digits: int, ours: list[float], theirs: list[float]
) -> list[Row]:
    """Our samples; where there is another engine, its own and how many times faster ours is."""
    rows = [Row(case, quantity, Spread.of(ours), digits)]
    if theirs:
        rows.append(Row(case, f"{gpu_peer.NAME}: {quantity}", Spread.of(theirs), digits))
        ratio = Spread.of(ours).median / Spread.of(theirs).median
        faster = ratio if quantity.endswith("/s") else 1 / ratio
        rows.append(Row(case, f"times {gpu_peer.NAME}", Spread.of([faster]), 2))
    return rows


def examine(core: Any, load: Workload) -> None:
    """Profile a stretch from the beginning of a workload and one from its middle."""
    from octavo.bench.gpu_kernels import profile

    submit(core, load)

    def turns(count: int) -> None:
        for _ in range(count):
            if core.has_work():
                core.turn()

    turns(3)
    profile(lambda: turns(4))
    turns(min(load.outputs) // 2)
    profile(lambda: turns(8))
    core.abort([i + 1 for i in range(len(load.prompts))])
    core.drain()


def drive(core: Any, load: Workload, shorten: int = 0) -> float:
    """Seconds from the first request to the last token."""
    began = time.perf_counter()
    submit(core, load, shorten)
    got = 0
    while core.has_work():
        got += turn(core)
    assert got == (shorten * len(load.prompts) or load.tokens_out), f"{got=}"
    return time.perf_counter() - began


def turn(core: Any) -> int:
    """Take a turn: how many tokens came of it."""
    return sum(len(output.tokens) // 4 for output in core.turn())


def submit(core: Any, load: Workload, shorten: int = 0) -> None:
    """Add all requests."""
    import numpy as np

    from octavo.engine.messages import AddRequest
    from octavo.engine.sampling_params import SamplingParams

    for i, (prompt, count) in enumerate(zip(load.prompts, load.outputs, strict=True)):
        params = SamplingParams(
            temperature=0.0, max_tokens=shorten or count, ignore_eos=True, detokenize=False
        )
        ids = np.asarray(prompt, np.int32).tobytes()
        core.add(AddRequest(i + 1, str(i), ids, params, arrival=time.monotonic()))
