"""What somebody who watches sees: which slot owns which page, and how far every slot is.

Built from the host's mirrors, so no view ever reads the device, and what lies in a step that was
not harvested yet still shows as it was before. Host code: no jax, no clock.
"""

import numpy as np

from octavo.engine.host import Host
from octavo.engine.messages import (
    FIRST_SLOT,
    IDLE_PAGE,
    RETURNING_PAGE,
    SHARERS_SHIFT,
    TRASH_PAGE,
    USED_SHIFT,
    PageMap,
    SlotState,
    Stats,
    View,
)
from octavo.engine.pool import Pool
from octavo.engine.sequence import Phase

MAX_CELLS = 20_000  # of one map: beyond, a cell stands for several pages
MOST = 255  # what eight bits hold


def take_view(lanes: list[Host], stats: Stats, time: float) -> View:
    """The engine as the host knows it now; hits are noted from here on, until the next.

    Of several lanes one after the other: pages of each group, and slots.
    """
    dims = lanes[0].limits.dims
    slots = [np.flatnonzero(host.serial >= 0) for host in lanes]
    groups = zip(*(host.pools for host in lanes), strict=True)
    rows = [
        _slot_rows(host, mine, lane * dims.slots)
        for lane, (host, mine) in enumerate(zip(lanes, slots, strict=True))
    ]
    return View(
        time=time,
        stats=stats,
        page_size=dims.page_size,
        maps=[_page_map(pools, slots, dims.slots) for pools in groups],
        slots=np.concatenate(rows).tobytes(),
    )


def forget_hits(lanes: list[Host]) -> None:
    """Note no more hits: nobody looks at views."""
    for host in lanes:
        for pool in host.pools:
            pool.hits = None


def _page_map(pools: tuple[Pool, ...], slots: list[np.ndarray], per_lane: int) -> PageMap:
    """One group's. slots: by lane i64[n], those that are somebody's, of `per_lane`."""
    told = [
        _cells(pool, mine, FIRST_SLOT + lane * per_lane)
        for lane, (pool, mine) in enumerate(zip(pools, slots, strict=True))
    ]
    pages = pools[0].group.pages
    cells = np.concatenate([cells for cells, _ in told])
    hits = np.concatenate([hits + lane * pages for lane, (_, hits) in enumerate(told)])
    per_cell = -(-len(cells) // MAX_CELLS)
    if per_cell > 1:
        cells, hits = _bucket(cells, per_cell), np.unique(hits // per_cell)
    return PageMap(
        pages=pages * len(pools),
        window=pools[0].group.window or 0,
        per_cell=per_cell,
        cells=cells.astype("<u4").tobytes(),
        hits=hits.astype("<u4").tobytes(),
    )


def _cells(pool: Pool, slots: np.ndarray, first_slot: int) -> tuple[np.ndarray, np.ndarray]:
    """u32[pages] who has each page of a lane, and u32[n] the hits since the last view."""
    cells = np.zeros(pool.group.pages, np.uint32)  # 0 is FREE_PAGE
    cells[0] = TRASH_PAGE
    cells[np.array(pool.index.idle_pages(), np.int32)] = IDLE_PAGE
    cells[np.array(pool.returns, np.int32)] = RETURNING_PAGE
    first, held = pool.first[slots].tolist(), pool.held[slots].tolist()
    rows = [
        pool.rows[slot, start:end]
        for slot, start, end in zip(slots.tolist(), first, held, strict=True)
    ]
    if rows:
        counts = pool.held[slots] - pool.first[slots]
        cells[np.concatenate(rows)] = np.repeat(slots + first_slot, counts)
    used = cells > TRASH_PAGE
    cells |= np.minimum(pool.references, MOST).astype(np.uint32) << SHARERS_SHIFT
    cells |= used.astype(np.uint32) << USED_SHIFT
    hits = np.unique(np.array(pool.hits or [], np.uint32))
    pool.hits = []
    return cells, hits


def _bucket(cells: np.ndarray, per_cell: int) -> np.ndarray:
    """u32[pages] -> u32[cells]: the highest owner and sharers of each run, and its pages in use."""
    padded = np.zeros(-(-len(cells) // per_cell) * per_cell, np.uint32)
    padded[: len(cells)] = cells
    runs = padded.reshape(-1, per_cell)
    owner = (runs & ((1 << SHARERS_SHIFT) - 1)).max(axis=1)
    sharers = ((runs >> SHARERS_SHIFT) & MOST).max(axis=1)
    used = np.minimum((runs >> USED_SHIFT).sum(axis=1), MOST).astype(np.uint32)
    return owner | (sharers << SHARERS_SHIFT) | (used << USED_SHIFT)


def _slot_rows(host: Host, slots: np.ndarray, before: int) -> np.ndarray:
    """u32[n, 7]: slot + `before`, handle, SlotState, prompt, length, goal, pages; see View."""
    filling = {sequence.slot for sequence in host.prefilling}
    held = sum((pool.held[slots] - pool.first[slots] for pool in host.pools), np.zeros_like(slots))
    rows = []
    for slot, pages in zip(slots.tolist(), held.tolist(), strict=True):
        sequence = host.occupant[slot]
        assert sequence is not None, f"{slot=} is empty"
        if sequence.phase is Phase.PREEMPTING:
            state = SlotState.PREEMPTING
        elif sequence.phase is not Phase.RUNNING:
            state = SlotState.STOPPING
        else:
            state = SlotState.PREFILL if slot in filling else SlotState.DECODE
        rows.append(
            (
                before + slot,
                sequence.handle,
                int(state),
                sequence.prompt_len,
                int((host.ran if state is SlotState.PREFILL else host.known)[slot]),
                int((host.known if state is SlotState.PREFILL else host.limit)[slot]),
                pages,
            )
        )
    return np.array(rows, "<u4").reshape(len(rows), 7)
