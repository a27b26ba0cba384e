"""`octavo bench NAME`: run one of the programs in bench/."""

import argparse
from importlib import import_module
from typing import Any

# name: the question it answers. Each is bench/NAME.py with `add_flags(parser)`, `run(args) -> int`.
PROGRAMS = {
    "throughput": "how many tokens per second, offline, with many random prompts at once",
    "latency": "how long one batch of 8 takes from prompt to last token",
    "serve": "what clients of an OpenAI endpoint see: time to first token, time per token",
    "frontend": "what the HTTP side alone can do, before an engine that answers at once",
    "fuzz": "what malformed requests do to a server, and whether anything is left behind",
    "startup": "how long until ready, with a cold and a warm compilation cache",
    "replicas": "what scaling, and the loss of a replica, look like under Ray Serve",
    "host": "what a step costs the host, with a model that computes nothing",
    "gpu": "the engine alone on an accelerator: random weights of a real shape, four workloads",
    "mesh": "one device beside a mesh of them: the same tokens, and how much faster",
    "golden": "whether real weights give the golden tokens on this device",
    "grammar": "llguidance beside xgrammar: schemas compiled, masks filled",
    "structured": "whether every text that a schema ruled parses and validates",
    "masked": "what a step costs more when grammars rule its rows",
    "embed": "how many texts per second a reading model embeds, and torch beside it",
    "llamacpp": "SmolLM2 beside llama.cpp, in turns, on this machine",
}

DESCRIPTION = """\
Measure one thing and print one table (or --json).

examples:
  octavo bench throughput smollm2-135m --input-len 128 --output-len 128 --num-prompts 64
  octavo bench serve --url http://localhost:8000 --concurrency 16
  octavo bench host
"""


def register(subparsers: Any) -> None:
    """Add the command, and one subcommand per program, to the command line."""
    parser = subparsers.add_parser("bench", help="measure one thing", description=DESCRIPTION)
    names = parser.add_subparsers(dest="bench", metavar="NAME", required=True)
    for name, question in PROGRAMS.items():
        program = import_module(f"octavo.bench.{name}")
        subparser = names.add_parser(
            name,
            help=question,
            description=program.__doc__,
        )
        subparser.add_argument("--json", action="store_true", help="print one JSON object instead")
        program.add_flags(subparser)


def run(args: argparse.Namespace) -> int:
    """Run the named program."""
    return int(import_module(f"octavo.bench.{args.bench}").run(args))
