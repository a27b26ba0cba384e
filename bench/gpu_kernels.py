"""Which kernels a stretch of steps spends the device's time in, as jax's own profiler saw them."""

import re
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from octavo.cli.table import print_table


def profile(work: Callable[[], None], most: int = 25) -> None:
    """Run `work` under the profiler and print the kernels that took the most time."""
    with tempfile.TemporaryDirectory(prefix="octavo-trace-") as folder:
        with jax.profiler.trace(folder):
            work()
        files = sorted(Path(folder).rglob("*.xplane.pb"))
        if not files:
            print("the profiler left no trace")
            return
        events = kernels(jax.profiler.ProfileData.from_file(str(files[-1])))
    print_kernels(events, most)


def kernels(data: Any) -> list[tuple[str, float, float]]:
    """(name, start, duration) in us of everything that ran on the first device, by start."""
    plane = next((p for p in data.planes if re.search(r"GPU:0$", p.name)), None)
    if plane is None:
        return []
    lines = [line for line in plane.lines if line.name.startswith("Stream")]
    events = [(e.name, e.start_ns / 1e3, e.duration_ns / 1e3) for x in lines for e in x.events]
    return sorted(events, key=lambda event: event[1])


def print_kernels(events: list[tuple[str, float, float]], most: int) -> None:
    """A table of kernels by name, and how much of the time the device was busy."""
    if not events:
        print("the profiler saw no kernel")
        return
    total, count = defaultdict[str, float](float), Counter[str]()
    busy, end = 0.0, events[0][1]
    for name, start, length in events:
        short = re.sub(r"[_.]\d+(?=$|_)", "", name)[:76]
        total[short] += length
        count[short] += 1
        busy += max(0.0, start + length - max(start, end))
        end = max(end, start + length)
    span = end - events[0][1]
    print(f"kernels: {len(events)} in {span / 1e3:.2f} ms, busy {busy / span:.1%}")
    rows = [
        (name, f"{count[name]}", f"{us / 1e3:.3f}", f"{us / count[name]:.1f}", f"{us / span:.1%}")
        for name, us in sorted(total.items(), key=lambda pair: -pair[1])[:most]
    ]
    print_table(("kernel", "times", "sum ms", "each us", "of all"), rows, indent="")
