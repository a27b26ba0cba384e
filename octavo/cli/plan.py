"""`octavo plan`: what fits on this machine, before anything is allocated."""

import argparse
import json
from dataclasses import asdict
from importlib import import_module
from typing import Any

from octavo.cli import targets
from octavo.cli.options import add_config_flags, config_from_args

DESCRIPTION = """\
Say what fits: weights, key-value cache, state, workspace, and how many sequences of which length.
Nothing is loaded and nothing is allocated. A model that does not fit is refused with the numbers.

examples:
  octavo plan --model smollm2-135m
  octavo plan --model ./my-model --max-model-len 8192 --dtype bfloat16
  octavo plan --model ./my-model --target v6e:1x1      on hardware that is not here
"""


def register(subparsers: Any) -> None:
    """Add the command to the command line."""
    parser = subparsers.add_parser(
        "plan", help="what fits, before anything is allocated", description=DESCRIPTION
    )
    add_config_flags(parser)
    parser.add_argument("--target", metavar="CHIP:TOPOLOGY", help=targets.TARGET_HELP)
    parser.add_argument("--json", action="store_true", help="print the plan as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print the memory plan of a config."""
    config = config_from_args(args)
    if args.target is not None:
        report = targets.module_for(args.target).plan(targets.Wanted(config, args.target))
        print(json.dumps(report.as_json()) if args.json else "\n".join(report.lines()))
        return 0
    plan = import_module("octavo.engine.planning").plan_memory(config)
    print(json.dumps(asdict(plan)) if args.json else "\n".join(plan.lines()))
    return 0
