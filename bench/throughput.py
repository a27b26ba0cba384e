"""How many tokens per second the engine makes of many prompts at once, without a server.

Prompts are random tokens and generation ignores the end-of-sequence token, so every run does the
same work.

example:
  octavo bench throughput smollm2-135m --input-len 128 --output-len 128 --num-prompts 64
"""

import argparse

from octavo.bench.common import Row, Spread, report
from octavo.bench.offline import add_offline_flags, settings, timed_rounds


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The engine's flags and the shape of the work."""
    add_offline_flags(parser, input_len=128, output_len=128, num_prompts=32)


def run(args: argparse.Namespace) -> int:
    """Measure and print."""
    seconds = timed_rounds(args)
    case = f"{args.num_prompts} x {args.input_len} -> {args.output_len}"
    work = {
        "requests/s": args.num_prompts,
        "output tok/s": args.num_prompts * args.output_len,
        "total tok/s": args.num_prompts * (args.input_len + args.output_len),
    }
    rows = [
        Row(case, name, Spread.of([amount / s for s in seconds]), 2)
        for name, amount in work.items()
    ]
    return report("throughput", settings(args), rows, args)
