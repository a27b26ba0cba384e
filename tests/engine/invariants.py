"""What must hold between any two turns of an engine: pages, bounds and order."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np

from octavo.engine import core as core_module
from octavo.engine.core import EngineCore
from octavo.engine.host import Host, Launch
from octavo.engine.pool import Pool
from octavo.engine.scheduler import schedule
from octavo.engine.sequence import Phase, Sequence


@jax.jit
def _copied(state: Any) -> Any:
    """The pages and slots as new buffers: a host view of the state itself would stop donation."""
    slots = state.slots
    kept = (state.pages, slots.active, slots.length)
    return jax.tree.map(lambda a: a | False if a.dtype == bool else a + 0, kept)


def _on_device(core: EngineCore) -> list[Any]:
    """The pages, the active rows and the lengths of every lane."""
    kept = jax.device_get(_copied(core.device.state))
    return [jax.tree.map(lambda a, i=i: a[i], kept) for i in range(len(core.lanes))]


def check(core: EngineCore) -> None:
    """Everything that must hold after any turn."""
    for lane, (pages, active, length) in enumerate(_on_device(core)):
        host = core.lanes[lane]
        assert all(s is None or s.lane == lane for s in host.occupant)
        for g, (pool, device) in enumerate(zip(host.pools, pages, strict=True)):
            free = device.free_stack[: device.free_top].tolist()
            _conserved(pool, free, _in_flight(core, lane, g))
            assert pool.bound <= device.free_top, f"{pool.bound} of {device.free_top} pages"
            _rows_hold_what_they_point_to(device, active, set(free))
            _references_are_rows(pool)
            if not host.flights:
                _mirrors_agree(host, pool, device, active, length)


def check_drained(core: EngineCore) -> None:
    """What must hold besides when nobody is left."""
    check(core)
    for host, (_, active, _) in zip(core.lanes, _on_device(core), strict=True):
        assert not host.live and not host.flights and not host.children and not host.prefilling
        assert host.waiting == 0 and host.running == 0, f"{host.waiting=} {host.running=}"
        for pool in host.pools:
            assert not pool.references.any() and not pool.rows.any() and not pool.held.any()
            assert len(pool.index) == pool.index.idle
            assert pool.free == pool.bound, f"{pool.free=} {pool.bound=}"
            assert pool.bound + len(pool.returns) + len(pool.index) == pool.group.pages - 1
        assert not active.any(), "a row still decodes"


def _in_flight(core: EngineCore, lane: int, group: int) -> list[int]:
    """Pages that a lane took in steps that were not harvested yet."""
    out: list[int] = []
    for flight in core.host.flights:  # the first lane's have the results of all
        result = (flight.leader or flight).result
        if result is None:
            continue
        taken = np.asarray(result[1])[lane]
        taken = taken[flight.part] if flight.parts > 1 else taken
        span = len(taken) // len(core.host.pools)
        count = int(taken[group * span + 1])
        out += taken[group * span + 2 : group * span + 2 + count].tolist()
    return out


def _conserved(pool: Pool, free: list[int], taken: list[int]) -> None:
    """Every page but the trash page is in exactly one place."""
    rows = np.flatnonzero(pool.references).tolist()
    places = [free, taken, rows, list(pool.returns), pool.index.idle_pages()]
    found = sorted(page for place in places for page in place)
    assert found == list(range(1, pool.group.pages)), (
        f"free {free}, taken {taken}, rows {rows}, returns {pool.returns}, "
        f"idle {pool.index.idle_pages()}"
    )
    assert 0 not in pool.index.pages()


def _references_are_rows(pool: Pool) -> None:
    count = np.zeros_like(pool.references)
    for slot in range(len(pool.held)):
        np.add.at(count, pool.rows[slot, pool.first[slot] : pool.held[slot]], 1)
    np.testing.assert_array_equal(count, pool.references)


def _rows_hold_what_they_point_to(device: Any, active: np.ndarray, free: set[int]) -> None:
    index = np.arange(device.table.shape[1])
    inside = (index >= device.first[:, None]) & (index < device.held[:, None])
    assert not device.table[~inside].any(), "a cell outside of [first, held) is not 0"
    for slot in np.flatnonzero(active).tolist():
        held = device.table[slot][inside[slot]].tolist()
        assert 0 not in held, f"slot {slot} points to the trash page"
        assert not free & set(held), f"slot {slot} points to a free page"


def _mirrors_agree(
    host: Host, pool: Pool, device: Any, active: np.ndarray, length: np.ndarray
) -> None:
    """With nothing in flight the host knows all of the device."""
    assert pool.bound == pool.free == device.free_top, f"{pool.bound} {pool.free} {device.free_top}"
    for slot, sequence in enumerate(host.occupant):
        if sequence is not None:
            np.testing.assert_array_equal(pool.rows[slot], device.table[slot])
            assert pool.held[slot] == device.held[slot] and pool.first[slot] == device.first[slot]
            assert host.ran[slot] == length[slot] == host.sent[slot]
        else:
            assert not active[slot], f"slot {slot} is nobody's and decodes"
            if slot not in host.stale:
                assert not device.table[slot].any() and not device.held[slot]


def key(host: Host, sequence: Sequence) -> tuple[int, int]:
    """Who goes first."""
    return (sequence.request.priority if host.limits.by_priority else 0, sequence.serial)


@contextmanager
def strict_order() -> Iterator[None]:
    """While inside, every schedule admits from the head of the queue and spares the oldest."""
    broken: list[str] = []

    def watched(lanes: list[Host]) -> Launch | None:
        before = [
            sorted(
                key(host, s) for _, _, s in host.queue if s.phase is Phase.WAITING and s.slot < 0
            )
            for host in lanes
        ]
        leaving = [
            [s for s in host.occupant if s is not None and s.phase is Phase.PREEMPTING]
            for host in lanes
        ]
        launch = schedule(lanes)
        for lane, host in enumerate(lanes):
            admitted = launch.parts[lane].draft.admissions if launch is not None else []
            keys = [key(host, s) for a in admitted if (s := host.occupant[a.slot]) is not None]
            if keys != before[lane][: len(keys)]:
                broken.append(f"admitted {keys} of {before[lane]}")
            if keys and any(key(host, s) < keys[-1] for s in leaving[lane]):
                broken.append(f"admitted {keys} past one that was preempted and comes back")
            inside = [s for s in host.occupant if s is not None and s.phase is not Phase.STOPPING]
            oldest = min(inside, key=lambda s: key(host, s), default=None)
            if oldest is not None and oldest.phase is Phase.PREEMPTING:
                if oldest not in leaving[lane]:
                    broken.append("the oldest was preempted")
        return launch

    setattr(core_module, "schedule", watched)
    try:
        yield
    finally:
        setattr(core_module, "schedule", schedule)
    assert not broken, broken
