"""The `octavo` command: finds the subcommand, runs it, and prints every user's error in one way."""

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NoReturn

import octavo

# Each is a file beside this one with `register(subparsers)` and `run(args) -> int`.
COMMANDS = ("serve", "chat", "generate", "run_batch", "plan", "compile", "doctor", "bench")

DEBUG_HELP = "show the traceback of an error"
EXIT_FAILURE = 1
EXIT_USAGE = 2  # what argparse itself exits with
EXIT_INTERRUPTED = 130  # 128 + SIGINT

DESCRIPTION = """\
Octavo serves large language models in JAX, on TPU, NVIDIA GPU, AWS Neuron and CPU.

begin here:
  octavo generate smollm2-135m --prompt "The capital of France is"
  octavo chat smollm2-135m
  octavo serve smollm2-135m --port 8000
  octavo doctor
"""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors read like all others, and do not repeat every flag."""

    def __init__(self, **options: Any) -> None:
        defaults: dict[str, Any] = {"formatter_class": _formatter, "allow_abbrev": False}
        super().__init__(**(defaults | options))

    def error(self, message: str) -> NoReturn:
        """Say what is wrong, and exit as argparse does."""
        self.exit(EXIT_USAGE, f"error: {message}\nhint: {self.prog} --help\n")


def _formatter(prog: str) -> argparse.HelpFormatter:
    formatter = argparse.RawDescriptionHelpFormatter(prog, max_help_position=30)
    # argparse forgets that subcommands are indented: without this `run-batch` takes two lines.
    formatter._action_max_length = 14
    return formatter


def build_parser() -> argparse.ArgumentParser:
    """The whole command line; importing a command imports no jax."""
    parser = Parser(
        prog="octavo",
        description=DESCRIPTION,
        epilog="octavo COMMAND --help shows a command's flags and an example.",
    )
    parser.add_argument("--version", action="version", version=f"octavo {octavo.__version__}")
    parser.add_argument("--debug", action="store_true", help=DEBUG_HELP)
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in COMMANDS:
        command = import_module(f"octavo.cli.{name}")
        command.register(subparsers)
        subparser = subparsers.choices[name.replace("_", "-")]
        subparser.set_defaults(run=command.run)
        subparser.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help=DEBUG_HELP
        )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; the exit code."""
    args = build_parser().parse_args(argv)
    try:
        return int(args.run(args))
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output went away (`octavo ... | head`): that is no error of ours, and
        # the interpreter's own flush at exit must not raise it again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        # An exception that Octavo defines was written for the user; any other is our bug.
        ours = type(error).__module__.startswith("octavo.")
        if args.debug or not ours:
            traceback.print_exc()
        else:
            print_error(error)
        return EXIT_USAGE if ours and isinstance(error, ValueError) else EXIT_FAILURE


def print_error(error: Exception) -> None:
    """`error: ...` and, where there is one, `hint: ...`: the only place that prints them."""
    message, hint = getattr(error, "message", "") or str(error), getattr(error, "hint", "")
    print(f"error: {message}", file=sys.stderr)
    if hint:
        print(f"hint: {hint}", file=sys.stderr)
