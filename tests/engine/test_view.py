"""The live view says of every page and slot what the host's own books say, and costs little."""

import time
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
from hypothesis import HealthCheck, given, settings

from octavo.engine.core import EngineCore
from octavo.engine.host import Host, Limits
from octavo.engine.messages import (
    FIRST_SLOT,
    FREE_PAGE,
    IDLE_PAGE,
    RETURNING_PAGE,
    TRASH_PAGE,
    SlotState,
    Stats,
    View,
)
from octavo.engine.sequence import Phase
from octavo.engine.state import Dims, PageGroup
from octavo.engine.view import MAX_CELLS, take_view
from tests.engine.invariants import check
from tests.engine.tiny import Client, begin_anew, prompt
from tests.engine.traces import add, traces


def cells_of(view: View, group: int = 0) -> np.ndarray:
    return np.frombuffer(view.maps[group].cells, "<u4")


def rows_of(view: View) -> list[list[int]]:
    return np.frombuffer(view.slots, "<u4").reshape(-1, 7).tolist()


def agrees(core: EngineCore) -> View:
    """Every page is in one place, and it is the one where the checked books have it."""
    check(core)
    view = core.view()
    for g, pool in enumerate(core.host.pools):
        cells = cells_of(view, g)
        owner, sharers, used = cells & 0xFFFF, (cells >> 16) & 0xFF, cells >> 24
        assert len(cells) == pool.group.pages
        assert np.flatnonzero(owner == TRASH_PAGE).tolist() == [0]
        assert np.flatnonzero(owner == IDLE_PAGE).tolist() == sorted(pool.index.idle_pages())
        assert np.flatnonzero(owner == RETURNING_PAGE).tolist() == sorted(pool.returns)
        np.testing.assert_array_equal(sharers, pool.references)
        np.testing.assert_array_equal(used, pool.references > 0)
        np.testing.assert_array_equal(owner >= FIRST_SLOT, pool.references > 0)
        for page in np.flatnonzero(owner >= FIRST_SLOT).tolist():
            slot = int(owner[page]) - FIRST_SLOT
            assert page in pool.rows[slot, pool.first[slot] : pool.held[slot]]
    busy = [slot for slot, sequence in enumerate(core.host.occupant) if sequence is not None]
    assert [row[0] for row in rows_of(view)] == busy
    return view


@given(trace=traces)
@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_every_page_is_shown_in_exactly_the_place_where_the_host_has_it(
    llama: EngineCore, trace: Any
) -> None:
    client = Client(begin_anew(llama))
    asked: dict[int, Any] = {}
    for kind, what in trace:
        if kind == "add":
            add(client, what, asked)
        elif kind == "abort" and asked:
            client.abort([what % len(asked)])
        elif kind == "turns":
            for _ in range(what):
                client.turn()
                agrees(llama)
    client.drain()
    view = agrees(llama)
    assert rows_of(view) == [] and not (cells_of(view) >= FIRST_SLOT).any()


def test_a_prefix_hit_lights_up_once_and_only_while_somebody_looks(llama: EngineCore) -> None:
    client = Client(begin_anew(llama))
    core = client.core
    client.add(prompt(17), max_tokens=2)
    client.drain()
    pages = sorted(core.host.pools[0].index.idle_pages())

    def hits() -> list[int]:
        return np.frombuffer(core.view().maps[0].hits, "<u4").tolist()

    assert hits() == []
    client.add(prompt(17), max_tokens=2)
    client.drain()
    assert len(pages) == 4 and hits() == pages
    assert hits() == []
    core.unwatch()
    client.add(prompt(17), max_tokens=2)
    client.drain()
    assert core.host.pools[0].hits is None and hits() == []


def test_a_slot_tells_how_much_of_its_prompt_is_read_and_how_far_it_wrote(
    llama: EngineCore,
) -> None:
    client = Client(begin_anew(llama, budget=16, depth=1))
    client.add(prompt(40), max_tokens=30, ignore_eos=True)
    client.turn()
    [[slot, handle, state, asked, length, goal, pages]] = rows_of(client.core.view())
    assert (slot, handle, state, asked) == (0, 0, SlotState.PREFILL, 40)
    assert (length, goal, pages) == (16, 40, 4)
    while rows_of(client.core.view())[0][2] == SlotState.PREFILL:
        client.turn()
    client.turn()
    [[_, _, state, _, length, goal, _]] = rows_of(client.core.view())
    assert (state, goal) == (SlotState.DECODE, 70) and 40 < length < 70
    client.drain()


def large_host(pages: int, slots: int = 256, held: int = 24) -> Host:
    """A full engine's books without an engine: every slot holds pages, the rest is idle."""
    dims = Dims(
        slots=slots,
        page_size=16,
        max_len=1024,
        vocab=32,
        groups=(PageGroup(window=0, pages=pages),),
        controls=8,
        max_chunk=512,
    )
    host = Host(Limits(dims, (slots,), (512,), 2, True, False))
    pool = host.pools[0]
    for slot in range(slots):
        sequence = SimpleNamespace(slot=slot, handle=slot, phase=Phase.RUNNING, prompt_len=100)
        host.occupant[slot] = cast(Any, sequence)
        host.serial[slot] = slot
        pool.begin(slot, 0, np.arange(1 + slot * held, 1 + (slot + 1) * held, dtype=np.int32))
        pool.references[1 + slot * held : 1 + (slot + 1) * held] += 1
    for page in range(1 + slots * held, pages):
        pool.index.insert(page.to_bytes(4, "little"), page)
        pool.index.rest(page)
    return host


def test_a_view_of_256_slots_and_8192_pages_takes_less_than_a_millisecond() -> None:
    host = large_host(8192)
    took = []
    for _ in range(50):
        began = time.perf_counter()
        take_view([host], Stats(), 0.0)
        took.append(time.perf_counter() - began)
    assert min(took) < 1e-3, f"{min(took) * 1e6:.0f} us"
    print(f"a view takes {1e6 * sorted(took)[25]:.0f} us")


def test_a_large_pool_is_shown_in_cells_of_several_pages_that_add_up() -> None:
    pages = 3 * MAX_CELLS - 7
    view = take_view([large_host(pages, slots=64)], Stats(), 0.0)
    cells = cells_of(view)
    assert view.maps[0].per_cell == 3 and len(cells) == -(-pages // 3)
    assert int((cells >> 24).sum()) == 64 * 24
    assert (cells & 0xFFFF).max() == FIRST_SLOT + 63
    assert not (cells == FREE_PAGE).any()
