"""`octavo compile`: compile a model's programs ahead, so that the next start finds them."""

import argparse
import json
from dataclasses import asdict
from importlib import import_module
from typing import Any

from octavo.cli.options import add_config_flags, config_from_args

DESCRIPTION = """\
Compile everything that serving a model needs and keep it on disk. No weights are read: a
config.json will do. A later start with the same settings, on the same kind of device, finds it.
The folder (--compilation-cache) may be copied to other machines of that kind.

examples:
  octavo compile smollm2-135m
  octavo compile ./my-model --max-model-len 8192 --compilation-cache /var/cache/octavo
"""


def register(subparsers: Any) -> None:
    """Add the command to the command line."""
    parser = subparsers.add_parser(
        "compile", help="compile a model's programs ahead", description=DESCRIPTION
    )
    add_config_flags(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Compile, and say what was done."""
    config = config_from_args(args)
    with import_module("octavo.engine.progress").startup_progress(args.json) as progress:
        done = import_module("octavo.engine.prepare").prepare(config, progress)
    if args.json:
        print(json.dumps({**asdict(done), "folder": str(done.folder)}))
        return 0
    print(f"backend   {done.reason}")
    print(f"compiled  {done.compiled} programs in {done.seconds:.1f} s, {done.found} were there")
    print(f"folder    {done.folder}")
    return 0
