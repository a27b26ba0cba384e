"""What a steady decode step costs the host, with a model that computes nothing.

A figure is one turn of the engine's loop: scheduling, dispatch, harvest and the encoding of the
message to the API process; waiting for the device is taken out. It should not grow with the
context, and stay far below a step of a real model.

example:
  octavo bench host --slots 256 --contexts 128 4096
"""

import argparse
from importlib import import_module

from octavo.bench.common import Row, Spread, report


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The slots and contexts to measure."""
    parser.add_argument("--slots", type=int, nargs="+", default=[1, 64, 256, 1024], metavar="N")
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 4096], metavar="N")
    parser.add_argument(
        "--steps", type=int, default=200, metavar="N", help="measured steps of each case"
    )
    parser.add_argument("--steps-in-flight", type=int, default=2, metavar="N")


def run(args: argparse.Namespace) -> int:
    """Measure and print."""
    # Imported here: the command line imports this file for its flags, and must not import jax.
    measure = import_module("octavo.bench.nothing").measure
    rows = []
    for slots in args.slots:
        for context in args.contexts:
            samples = measure(slots, context, args.steps, args.steps_in_flight)
            case = f"{slots} slots, context {context}"
            rows.append(Row(case, "host us/step", Spread.of(samples)))
    return report("host", {"steps": args.steps, "in_flight": args.steps_in_flight}, rows, args)
