"""`octavo plan`: what fits on this machine, before anything is allocated."""

import argparse
import json
from dataclasses import asdict
from importlib import import_module
from typing import Any

from octavo.cli.options import add_config_flags, config_from_args
from octavo.cli.table import print_table, size

DESCRIPTION = """\
Say what fits: weights, key-value pages, workspace, and how many sequences of which length.
Nothing is loaded and nothing is allocated.

examples:
  octavo plan --model smollm2-135m
  octavo plan --model ./my-model --max-model-len 8192 --dtype bfloat16
"""


def register(subparsers: Any) -> None:
    """Add the command to the command line."""
    parser = subparsers.add_parser(
        "plan", help="what fits, before anything is allocated", description=DESCRIPTION
    )
    add_config_flags(parser)
    parser.add_argument("--json", action="store_true", help="print the plan as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print the memory plan of a config."""
    config = config_from_args(args)
    plan = import_module("octavo.engine.memory").plan_memory(config)
    if args.json:
        print(json.dumps(asdict(plan), default=str))
        return 0
    print(f"{config.model}")
    print_table(
        ("what", "value"), [(label(name), shown(name, v)) for name, v in asdict(plan).items()]
    )
    return 0


def label(name: str) -> str:
    """`weight_bytes` as people read it: weight."""
    return name.removesuffix("_bytes").replace("_", " ")


def shown(name: str, value: Any) -> str:
    """A byte count with its unit, a list by commas, everything else as it is."""
    if name.endswith("_bytes") and isinstance(value, int):
        return size(value)
    if isinstance(value, (list, tuple)):
        return ", ".join(str(item) for item in value)
    return f"{value:,}" if isinstance(value, int) else str(value)
