"""How long one batch takes, from its prompts to its last token.

example:
  octavo bench latency smollm2-135m --num-prompts 8 --input-len 32 --output-len 128
"""

import argparse

from octavo.bench.common import Row, Spread, report
from octavo.bench.offline import add_offline_flags, settings, timed_rounds


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The engine's flags and the shape of the batch."""
    add_offline_flags(parser, input_len=32, output_len=128, num_prompts=8)


def run(args: argparse.Namespace) -> int:
    """Measure and print."""
    seconds = timed_rounds(args)
    case = f"{args.num_prompts} x {args.input_len} -> {args.output_len}"
    rows = [
        Row(case, "batch ms", Spread.of([1e3 * s for s in seconds])),
        Row(case, "ms per token", Spread.of([1e3 * s / args.output_len for s in seconds]), 2),
    ]
    return report("latency", settings(args), rows, args)
