"""`octavo compile`: compile a model's programs ahead, so that the next start finds them."""

import argparse
import json
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

from octavo.cli import targets
from octavo.cli.options import add_config_flags, config_from_args
from octavo.engine.config import ConfigError, EngineConfig

DESCRIPTION = """\
Compile everything that serving a model needs and keep it on disk. No weights are read: a
config.json will do. A later start with the same settings, on the same kind of device, finds it.
The folder (--compilation-cache) may be copied to other machines of that kind.

examples:
  octavo compile smollm2-135m
  octavo compile ./my-model --max-model-len 8192 --compilation-cache /var/cache/octavo
  octavo compile ./my-model --target v6e:1x1 --output ./compiled     for a TPU, without one
"""


def register(subparsers: Any) -> None:
    """Add the command to the command line."""
    parser = subparsers.add_parser(
        "compile", help="compile a model's programs ahead", description=DESCRIPTION
    )
    add_config_flags(parser)
    parser.add_argument("--target", metavar="CHIP:TOPOLOGY", help=targets.TARGET_HELP)
    parser.add_argument(
        "--output", metavar="FOLDER", help="with --target: where programs and report.json go"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Compile, and say what was done."""
    config = config_from_args(args)
    if args.target is not None:
        return _for_target(config, args)
    if args.output is not None:
        raise ConfigError(
            "`--output` is for programs of another machine, and no `--target` names it",
            "--compilation-cache takes the folder for this one",
        )
    with import_module("octavo.engine.progress").startup_progress(args.json) as progress:
        done = import_module("octavo.engine.prepare").prepare(config, progress)
    if args.json:
        print(json.dumps({**asdict(done), "folder": str(done.folder)}))
        return 0
    print(f"backend   {done.reason}")
    print(f"compiled  {done.compiled} programs in {done.seconds:.1f} s, {done.found} were there")
    print(f"folder    {done.folder}")
    return 0


def _for_target(config: EngineConfig, args: argparse.Namespace) -> int:
    """Compile for hardware that is not here."""
    if args.output is None:
        raise ConfigError(
            "`--target` needs a folder for what it compiles", "add --output ./compiled"
        )
    module = targets.module_for(args.target)
    with import_module("octavo.engine.progress").startup_progress(args.json) as progress:
        wanted = targets.Wanted(config, args.target, Path(args.output), progress)
        report = module.compile(wanted)
    print(json.dumps(report.as_json()) if args.json else "\n".join(report.lines()))
    return 0
