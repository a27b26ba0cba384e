"""What a step costs more when grammars rule its rows: the real loop, and a device that only sleeps.

A stand-in takes the place of the accelerator: its forward pass is a sleep of --step milliseconds,
its sampling takes the first token that a row's mask allows, and takes no time. All else is the
engine: schedule, masks, harvest. Every stream writes an endless list of JSON objects; in half of
the runs, which take turns, without a grammar.

example:
  octavo bench masked --streams 64 --step 10 --tokenizers smollm2-135m
"""

import argparse
import json
from importlib import import_module

from octavo.bench.common import Row, Spread, report

PEOPLE = {
    "type": "array",
    "minItems": 10_000,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 12},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "tags": {"type": "array", "items": {"type": "string", "maxLength": 8}, "maxItems": 4},
            "score": {"type": "number"},
        },
        "required": ["name", "age", "tags", "score"],
    },
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The streams and the step."""
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 64], metavar="N")
    parser.add_argument("--step", type=float, default=10.0, metavar="MS")
    parser.add_argument("--steps", type=int, default=200, metavar="N", help="measured, a run")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="runs of each kind")
    parser.add_argument("--tokenizers", nargs="+", default=["smollm2-135m"], metavar="MODEL")


def run(args: argparse.Namespace) -> int:
    """Measure and print."""
    # Imported here: the command line imports this file for its flags, and must not import jax.
    sleeping = import_module("octavo.bench.sleeping")
    rows = []
    for model in args.tokenizers:
        for streams in args.streams:
            plain, masked, ratios = [], [], []
            for _ in range(args.rounds):
                with sleeping.engine(model, streams, args.steps, args.step / 1000) as core:
                    plain.append(1e3 * sleeping.seconds_per_step(core, streams, args.steps, ""))
                    text = json.dumps({"grammars": [{"json_schema": PEOPLE}]})
                    masked.append(1e3 * sleeping.seconds_per_step(core, streams, args.steps, text))
                    ratios.append(masked[-1] / plain[-1])
            case = f"{streams} streams, {sleeping.vocab_of(model):,} tokens"
            rows.append(Row(case, "unmasked ms/step", Spread.of(plain), 2))
            rows.append(Row(case, "masked ms/step", Spread.of(masked), 2))
            rows.append(Row(case, "masked / unmasked", Spread.of(ratios), 3))
    settings = {"step_ms": args.step, "steps": args.steps, "rounds": args.rounds}
    return report("masked", settings, rows, args)
