"""The engine on one accelerator: random weights of a real model's shape, four workloads.

examples:
  octavo bench gpu --model shapes/llama31_8b single_stream decode_heavy
  octavo bench gpu --model shapes/llama31_8b --steps --kernels
"""

import argparse
import time
from importlib import import_module
from typing import Any

from octavo.bench.common import Row, Spread, report
from octavo.bench.gpu_steps import Steps, print_builds, time_programs
from octavo.bench.workloads import NAMES, Workload, make
from octavo.cli.options import add_config_flags, config_from_args


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The shape, and which workloads."""
    parser.add_argument("workloads", nargs="*", help=f"any of {', '.join(NAMES)}; all by default")
    parser.add_argument("--rounds", type=int, default=1, help="times each workload is run")
    parser.add_argument("--steps", action="store_true", help="tell where the time of a step goes")
    parser.add_argument("--kernels", action="store_true", help="and which kernels take it")
    add_config_flags(parser)
    parser.set_defaults(load_format="dummy", max_model_len=4096, enable_prefix_caching=False)


def run(args: argparse.Namespace) -> int:
    """Measure and print."""
    for name in args.workloads:
        if name not in NAMES:
            raise ValueError(f"there is no workload `{name}`; there are {', '.join(NAMES)}")
    core = import_module("octavo.engine.core").EngineCore(config_from_args(args))
    print(*core.summary(), sep="\n", flush=True)
    if args.steps:
        print_builds(core)
        time_programs(core)
    rows = []
    vocab = core.resolved.dims.vocab
    drive(core, make("decode_heavy", vocab), shorten=16)  # warm
    for name in args.workloads or NAMES:
        load = make(name, vocab)
        steps = Steps()
        with steps.watch(core):
            seconds = [drive(core, load) for _ in range(args.rounds)]
        if args.steps:
            print(f"\n{name}: {', '.join(f'{s:.2f}' for s in seconds)} s")
            steps.print()
        if args.kernels:
            examine(core, load)
        if name == "single_stream":
            each = [1e3 * s / load.tokens_out for s in seconds]
            rows.append(Row(name, "ms a token", Spread.of(each), digits=2))
        else:
            rows.append(Row(name, "out tok/s", Spread.of([load.tokens_out / s for s in seconds])))
            total = load.tokens_in + load.tokens_out
            rows.append(Row(name, "in+out tok/s", Spread.of([total / s for s in seconds])))
    stats = core.stats()
    facts = {"stalls": stats.stalls, "compiles": stats.compiles_after_ready, "steps": stats.steps}
    facts["host us/step"] = round(1e6 * stats.host_seconds / max(1, stats.steps))
    core.close()
    return report("gpu", facts, rows, args)


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
        got += sum(len(output.tokens) // 4 for output in core.turn())
    assert got == (shorten * len(load.prompts) or load.tokens_out), f"{got=}"
    return time.perf_counter() - began


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
