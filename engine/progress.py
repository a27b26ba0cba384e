"""Progress bars for people: on a terminal only, and gone when done."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from octavo.engine.assemble import Progress as Report


def _bar(show: bool) -> Progress:
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description:24}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not show or not sys.stderr.isatty(),
    )


class Bar:
    """Counts finished requests, and shows tokens a second."""

    def __init__(self, what: str, total: int, *, show: bool) -> None:
        self._progress = _bar(show)
        self._task = self._progress.add_task(what, total=total, note="")
        self._began, self._tokens = time.perf_counter(), 0

    def advance(self, tokens: int) -> None:
        """One more is done; it has this many tokens."""
        self._tokens += tokens
        rate = self._tokens / max(1e-9, time.perf_counter() - self._began)
        self._progress.update(self._task, advance=1, note=f"{rate:,.0f} tokens/s")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()


@contextmanager
def startup_progress(quiet: bool = False) -> Iterator[Report]:
    """A bar for the weights and one for the programs."""
    with _bar(not quiet) as progress:
        tasks: dict[str, TaskID] = {}

        def report(what: str, done: int, total: int) -> None:
            name = "loading weights" if what == "weights" else "compiling programs"
            scale = 1e6 if what == "weights" else 1
            if name not in tasks:
                tasks[name] = progress.add_task(name, total=total / scale, note="")
            unit = "MB" if what == "weights" else what
            progress.update(tasks[name], completed=done / scale, total=total / scale, note=unit)

        yield report
