"""What a steady decode step costs the host, with a model that computes nothing.

example:
  octavo bench host
"""

import argparse


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The slots and contexts to measure."""


def run(args: argparse.Namespace) -> int:
    """Measure and print."""
    raise SystemExit("not yet")
