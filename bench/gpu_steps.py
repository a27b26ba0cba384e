"""Where a run's time goes: every step is timed as the run loop meets it, and summed up by its kind.

time    between the arrival of the result before and of this one: while the device is the slower
        side, what the step takes there; else what the host takes to get to it
call    how long the dispatching thread was inside the calls of the step's programs
wait    how long it then waited for the step's result; near 0 means that the host is the slower
used    decode rows and prompt tokens that were real, of those that the step computed
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from octavo.cli.table import print_table

HEADER = ("step", "steps", "sum s", "mean ms", "p50", "p90", "call", "sample", "wait", "used")


@dataclass
class Kind:
    """All steps of one (R, T)."""

    times: list[float] = field(default_factory=list)  # seconds
    call: float = 0.0
    sample: float = 0.0
    wait: float = 0.0
    rows: int = 0  # real ones, in all
    tokens: int = 0


class Steps:
    """Times the steps of an EngineCore while it `watch`es one."""

    def __init__(self) -> None:
        self.kinds: dict[tuple[int, int], Kind] = {}
        self._last = 0.0

    @contextmanager
    def watch(self, core: Any) -> Iterator[None]:
        """Stand between the run loop and its device."""
        device = core.device
        device.begin = self._begin(device.begin)
        device.finish = self._finish(device.finish)
        device.read = self._read(device.read)
        self._last = time.perf_counter()
        try:
            yield
        finally:
            del device.begin, device.finish, device.read

    def _kind(self, rows: int, tokens: int) -> Kind:
        return self.kinds.setdefault((rows, tokens), Kind())

    def _begin(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        def begin(launch: Any) -> Any:
            began = time.perf_counter()
            out = inner(launch)
            kind = self._kind(launch.rows, launch.tokens)
            kind.call += time.perf_counter() - began
            kind.rows += int(launch.flight.decoding.sum())
            kind.tokens += sum(count for _, _, count, _ in launch.flight.chunks)
            return out

        return begin

    def _finish(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        def finish(launch: Any, *rest: Any) -> Any:
            began = time.perf_counter()
            out = inner(launch, *rest)
            kind = self._kind(launch.rows, launch.tokens)
            kind.sample += time.perf_counter() - began
            return out

        return finish

    def _read(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        def read(flight: Any, **rest: Any) -> Any:
            began = time.perf_counter()
            out = inner(flight, **rest)
            now = time.perf_counter()
            kind = self._kind(flight.rows, flight.tokens)
            kind.wait += now - began
            kind.times.append(now - self._last)
            self._last = now
            return out

        return read

    def rows(self) -> list[tuple[str, ...]]:
        """One line a kind of step, the one that took the most first; times in ms."""
        kinds = sorted(self.kinds.items(), key=lambda pair: -sum(pair[1].times))
        return [_row(*shape, kind) for shape, kind in kinds if kind.times]

    def print(self) -> None:
        """The table."""
        print_table(HEADER, self.rows(), indent="")


def _name(rows: int, tokens: int) -> str:
    return f"{rows} rows" + (f" + {tokens}" if tokens else "") if rows else "edit"


def _row(rows: int, tokens: int, kind: Kind) -> tuple[str, ...]:
    count, times = len(kind.times), sorted(kind.times)
    total = sum(times)
    used = f"{kind.rows / max(1, count * rows):.0%}"
    if tokens:
        used += f" + {kind.tokens / (count * tokens):.0%}"
    return (
        _name(rows, tokens),
        str(count),
        f"{total:.2f}",
        *(f"{1e3 * s:.2f}" for s in (total / count, times[count // 2], times[count * 9 // 10])),
        *(f"{1e3 * s / count:.2f}" for s in (kind.call, kind.sample, kind.wait)),
        used,
    )


def time_programs(core: Any, rounds: int = 5) -> None:
    """Every forward program alone, over empty rows: the call with nothing in flight, and the whole.

    Attention has nothing to do, all else is as in a full step.
    """
    import jax
    import numpy as np

    from octavo.engine.plan import Draft

    device, rows = core.device, []
    nothing = Draft(returned=[[] for _ in core.host.pools])
    vector = jax.device_put(np.asarray(device.packer.pack(nothing))[None])
    for key, program in sorted(device.programs.forward.items()):
        arguments = (vector,) if key[1] else ()
        calls, wholes = [], []
        for _ in range(rounds):
            jax.block_until_ready(device.state)
            began = time.perf_counter()
            device.state, passed, _ = program(device.params, device.state, *arguments)
            calls.append(time.perf_counter() - began)
            jax.block_until_ready(passed)
            wholes.append(time.perf_counter() - began)
        began = time.perf_counter()
        for _ in range(rounds):
            device.state, passed, _ = program(device.params, device.state, *arguments)
        jax.block_until_ready(passed)
        each = (time.perf_counter() - began) / rounds
        cells = (1e3 * s for s in (sorted(calls)[rounds // 2], sorted(wholes)[rounds // 2], each))
        rows.append((_name(*key), *(f"{ms:.2f}" for ms in cells)))
    print_table(("forward alone", "call ms", "call to end", "in a row"), rows, indent="")


def print_builds(core: Any, most: int = 8) -> None:
    """What the programs took to trace (one after the other) and to compile (in parallel)."""
    builds = core.device.programs.builds
    traced, compiled = (sum(pair[i] for pair in builds.values()) for i in (0, 1))
    print(
        f"{len(builds)} programs: traced in {traced:.1f} s, compiled in {compiled:.1f} s of thread"
    )
    slow = sorted(builds.items(), key=lambda pair: -sum(pair[1]))[:most]
    rows = [(name, *(f"{s:.2f}" for s in pair)) for name, pair in slow]
    print_table(("slowest", "trace s", "compile s"), rows, indent="")
