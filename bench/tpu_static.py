"""What our TPU kernels cost, read from their schedules, on a machine without a TPU.

    python -m octavo.bench.tpu_static                    the table, for every chip
    python -m octavo.bench.tpu_static v6e --page 16      one chip, one page size
    python -m octavo.bench.tpu_static --check FILE       fail where a number grew by more than 3 %
    python -m octavo.bench.tpu_static --write FILE       keep the numbers of this libtpu

The heads are Llama-3.1-8B's unless --heads says otherwise: 32 query, 8 KV heads of 128.

What the numbers are: engine/ahead/attention.py. The share is of the cycles that the copies take.
"""

import argparse
import json
import sys
from pathlib import Path

from octavo.engine.ahead.attention import HEADS, KINDS, TOKENS, Numbers, costs
from octavo.engine.ahead.schedule import CHIPS, NO_LIBTPU, libtpu_version

GROWTH = 1.03


def grown(now: dict[str, Numbers], kept: dict[str, Numbers]) -> list[str]:
    """A sentence for each number that is more than 3 % above the one kept."""
    found = []
    for name, numbers in now.items():
        for what, value in numbers.items():
            before = kept.get(name, {}).get(what)
            if before is None:
                found.append(f"{name}: {what} was not kept; run with --write")
            elif value > before * GROWTH:
                found.append(f"{name}: {what} grew from {before:,} to {value:,}")
    return found


def line(name: str, n: Numbers) -> str:
    """One row of the table."""
    return (
        f"{name:<26}{n['decode']:>8,}{n['copies']:>8,}{n['decode'] / n['copies']:>7.2f}"
        f"{n['prefill']:>9,}{n['decode spills']:>8,}{n['prefill spills']:>8,}"
    )


def main() -> None:
    """Print the table; exit 1 where --check finds growth."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("chips", nargs="*", metavar="CHIP", help=f"of {', '.join(CHIPS)}")
    parser.add_argument("--kind", action="append", choices=list(KINDS))
    parser.add_argument("--page", action="append", type=int)
    parser.add_argument("--heads", nargs=3, type=int, default=HEADS, metavar=("H", "K", "D"))
    parser.add_argument("--check", type=Path)
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    chips = options.chips or list(CHIPS)
    if unknown := set(chips) - set(CHIPS):
        parser.error(f"no chip {', '.join(sorted(unknown))}; there are {', '.join(CHIPS)}")
    if libtpu_version() is None:
        parser.error(NO_LIBTPU)
    kinds, pages = tuple(options.kind or ()), tuple(options.page or ())
    print(f"libtpu {libtpu_version()}, bundles per {TOKENS:,} tokens")
    print(f"{'':<26}{'decode':>8}{'copies':>8}{'share':>7}{'prefill':>9}{'spills':>16}")
    rows = {}
    for chip in chips:
        for name, numbers in costs(chip, heads=tuple(options.heads), kinds=kinds, pages=pages):
            rows[name] = numbers
            print(line(name, numbers), flush=True)
    if options.write:
        kept = {"libtpu": libtpu_version(), "rows": rows}
        options.write.write_text(json.dumps(kept, indent=1) + "\n")
    if options.check:
        found = grown(rows, json.loads(options.check.read_text())["rows"])
        print("\n".join(found))
        sys.exit(bool(found))


if __name__ == "__main__":
    main()
