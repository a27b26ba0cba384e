"""`octavo doctor neuron`: what this instance proves, what fails, what could not be asked here."""

import sys
from importlib import import_module

from octavo.cli.table import format_table


def run() -> int:
    """Print the table; 1 where a check that serving needs failed or could not be made."""
    conformance = import_module("octavo.backends.neuron.conformance")
    checks = import_module("octavo.backends.neuron.checks").CHECKS
    settings = import_module("octavo.backends.neuron.settings").Settings.read()
    bench = conformance.open_bench(settings)
    rows, wrong = [], 0
    try:
        for result in conformance.run_all(bench, checks):
            status = result.status
            if not result.needed and status == "failed":
                status = "failed, not needed"
            rows.append((result.question, status, _short(result.found)))
            wrong += result.needed and result.status != "proven"
            print(".", end="", file=sys.stderr, flush=True)
    finally:
        if bench.cores is not None:
            bench.cores.close()
    print(file=sys.stderr)
    print(format_table(("check", "result", "found"), rows, indent=""))
    if wrong:
        print(f"{wrong} checks that serving needs are not proven here; docs/neuron.md says how")
    return 1 if wrong else 0


def _short(text: str, most: int = 160) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 3] + "..."
