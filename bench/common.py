"""What every program prints the same way: what is needed to repeat it, and a spread."""

import argparse
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Self

import numpy as np

import octavo
from octavo.cli.table import print_table


@dataclass(frozen=True)
class Spread:
    """The middle of some samples and how far they scatter."""

    p10: float
    median: float
    p90: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Self:
        """Percentiles of at least one sample."""
        p10, median, p90 = np.percentile(np.asarray(samples, np.float64), (10, 50, 90))
        return cls(float(p10), float(median), float(p90))

    def cells(self, digits: int = 1) -> tuple[str, str, str]:
        """Three table cells: median, p10, p90."""
        return tuple(f"{v:,.{digits}f}" for v in (self.median, self.p10, self.p90))  # type: ignore[return-value]


@dataclass(frozen=True)
class Row:
    """One line of a result: a case, a quantity with its unit, and its spread."""

    case: str
    quantity: str  # with the unit: "output tok/s"
    spread: Spread
    digits: int = 1


def machine() -> dict[str, str]:
    """What the figures belong to."""
    return {
        "processor": _processor(),
        "cores": str(len(os.sched_getaffinity(0))),
        "python": platform.python_version(),
        "jax": metadata.version("jax"),
        "octavo": octavo.__version__,
        "commit": _commit(),
    }


def report(
    name: str, settings: dict[str, Any], rows: Sequence[Row], args: argparse.Namespace
) -> int:
    """Print the result as one table, or as one JSON object with --json; the exit code."""
    about = machine()
    if args.json:
        result = {"bench": name, "machine": about, "settings": settings}
        print(json.dumps({**result, "rows": [asdict(row) for row in rows]}))
        return 0
    print(
        f"# {name}  {about['processor']} x {about['cores']}  jax {about['jax']}  "
        f"octavo {about['octavo']}  commit {about['commit']}"
    )
    print("# " + "  ".join(f"{key}={value}" for key, value in settings.items()))
    header = ("case", "quantity", "median", "p10", "p90")
    print_table(header, [(r.case, r.quantity, *r.spread.cells(r.digits)) for r in rows], indent="")
    return 0


def random_prompts(count: int, length: int, *, vocab_size: int, seed: int) -> list[list[int]]:
    """Prompts that share no prefix: `count` lists of `length` token ids."""
    rng = np.random.default_rng(seed)
    # Low ids are special tokens in most vocabularies.
    low = min(10, vocab_size - 1)
    return [list(map(int, row)) for row in rng.integers(low, vocab_size, (count, length))]


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _commit() -> str:
    """The commit of a checkout, with + where files differ from it; `none` for a wheel."""
    here = Path(__file__).resolve().parent

    def git(*words: str) -> str:
        return subprocess.run(
            ("git", "-C", str(here), *words), capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        dirty = "+" if git("status", "--porcelain", "--untracked-files=no") else ""
        return git("rev-parse", "--short", "HEAD") + dirty
    except (OSError, subprocess.CalledProcessError):
        return "none"
