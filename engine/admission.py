"""Admission: which of the waiting get a slot in this step, and with which pages they begin.

Host code: no jax, no clock.
"""

import heapq

import numpy as np

from octavo.engine.host import Host
from octavo.engine.plan import (
    BIAS_IDS,
    BIAS_VALUES,
    HISTORY,
    Admission,
    Draft,
    pieces,
    upload_capacity,
)
from octavo.engine.prefix import extend_hashes
from octavo.engine.sequence import Phase, Sequence
from octavo.engine.state import STOP_IDS


def admit(
    host: Host,
    draft: Draft,
    chunks: list[tuple[Sequence, int, int, bool]],
    budget: int,
) -> None:
    """Admit from the head of the queue while slots, tokens, pages and the plan have room."""
    dims = host.limits.dims
    if any(s.phase is Phase.PREEMPTING for flight in host.flights for s in flight.stops):
        return  # it comes back to the queue at its own place: nobody slips in before
    room = upload_capacity(dims)
    shared_room = dims.returns
    while budget > 0 and host.free_slots and len(draft.admissions) < dims.chunks:
        sequence = host.peek()
        if sequence is None or len(chunks) == dims.chunks or host.stopping:
            return
        tokens = sequence.tokens
        bias = sequence.request.sampling.logit_bias or {}
        uploaded = len(tokens) + 2 * len(bias)
        if uploaded > room or len(draft.uploads) + 3 > pieces(dims):
            return
        hit, pages = find_prefix(host, sequence)
        shared = max((len(ids) for _, ids in pages), default=0)
        if shared > shared_room or not fits(host, chunks, len(tokens), hit, pages):
            return
        host.pop()
        room -= uploaded
        shared_room -= shared
        slot = host.free_slots[0]
        _take(host, draft, sequence, slot, hit, pages)
        count = min(len(tokens) - hit, budget)
        chunks.append((sequence, hit, count, hit + count == len(tokens)))
        budget -= count


def find_prefix(host: Host, sequence: Sequence) -> tuple[int, list[tuple[int, np.ndarray]]]:
    """The longest prefix whose pages every group still has.

    Returns the tokens covered and, per group, the index of the first page and the page ids. A hit
    leaves at least one token to run; in a window group only the pages that a later query can see
    are needed.
    """
    size, shift = host.limits.dims.page_size, host.limits.dims.shift
    most = (len(sequence.tokens) - 1) >> shift
    nothing = [(0, np.zeros(0, np.int32)) for _ in host.pools]
    if not sequence.reads_cache or most == 0:
        return 0, nothing
    if not host.limits.prefix_caching:
        return _fork(host, sequence, nothing)
    extend_hashes(sequence.hashes, sequence.root, sequence.tokens, most, size)
    found = [[pool.index.find(name) for name in sequence.hashes[:most]] for pool in host.pools]
    for length in range(_unbroken(host, found, most), 0, -1):
        first = [pool.window_first(length * size) for pool in host.pools]
        if all(all(ids[f:length]) for ids, f in zip(found, first, strict=True)):
            pages = [
                (f, np.array(ids[f:length], np.int32)) for ids, f in zip(found, first, strict=True)
            ]
            return length * size, pages
    return 0, nothing


def _unbroken(host: Host, found: list[list[int]], most: int) -> int:
    """Pages up to which the groups without a window have everything."""
    for pool, ids in zip(host.pools, found, strict=True):
        if not pool.group.window and 0 in ids[:most]:
            most = ids.index(0)
    return most


def _fork(
    host: Host, sequence: Sequence, nothing: list[tuple[int, np.ndarray]]
) -> tuple[int, list[tuple[int, np.ndarray]]]:
    """Without an index, a child still shares the pages of its parent's prompt while that runs."""
    parent = sequence.parent
    if parent is None or parent.phase is not Phase.RUNNING or len(sequence.tokens) < 2:
        return 0, nothing
    slot = parent.slot
    full = min(int(host.ran[slot]), sequence.prompt_len - 1) >> host.limits.dims.shift
    size = host.limits.dims.page_size
    pages = []
    for pool in host.pools:
        first = pool.window_first(full * size)
        if first < max(pool.first[slot], pool.sent_first[slot]):
            return 0, nothing
        pages.append((first, pool.rows[slot, first:full].copy()))
    return full * size, pages


def fits(
    host: Host,
    chunks: list[tuple[Sequence, int, int, bool]],
    tokens: int,
    hit: int,
    pages: list[tuple[int, np.ndarray]],
) -> bool:
    """Whether the whole prompt fits beside what runs, without preempting anybody.

    The reserve is one page for each running sequence, so that an admission does not throw out at
    the next step what it took in at this one.
    """
    size = host.limits.dims.page_size
    for pool, (_, ids) in zip(host.pools, pages, strict=True):
        want = -(-(tokens + 1) // size) - hit // size
        for sequence in host.prefilling:
            slot = sequence.slot
            want += -(-int(host.known[slot]) // size) - -(-int(host.sent[slot]) // size)
        if pool.group.window:
            span = -(-(pool.group.window + host.limits.token_buckets[-1]) // size) + 1
            want = min(want, span)
        idle = sum(1 for page in ids.tolist() if pool.references[page] == 0)
        if want > pool.available - idle - (host.running if host.running else 0):
            return False
    return True


def _take(
    host: Host,
    draft: Draft,
    sequence: Sequence,
    slot: int,
    hit: int,
    pages: list[tuple[int, np.ndarray]],
) -> None:
    """Give a sequence its slot, its shared pages and its place in the plan."""
    taken = heapq.heappop(host.free_slots)
    assert taken == slot, f"{taken=} {slot=}"
    host.occupy(sequence, slot)
    if slot in host.stale:
        host.stale.remove(slot)
    for pool, (first, ids) in zip(host.pools, pages, strict=True):
        pool.share(ids.tolist())
        pool.begin(slot, first, ids)
    host.sent[slot] = host.ran[slot] = hit
    host.indexed[slot] = hit >> host.limits.dims.shift
    host.prefilling.append(sequence)
    if host.limits.prefix_caching and sequence.reads_cache:
        host.counters.prefix_queries += len(sequence.tokens)
        host.counters.prefix_hits += hit
    sampling = sequence.request.sampling
    draft.admissions.append(
        Admission(
            slot=slot,
            length=hit,
            prompt_len=sequence.prompt_len,
            limit=sequence.limit,
            min_tokens=sequence.min_tokens,
            seed=sequence.seed,
            stop_ids=sequence.stop_ids[:STOP_IDS],
            sampling=sequence.controls,
            pages=pages,
        )
    )
    draft.uploads.append((HISTORY, slot, 0, sequence.tokens))
    bias = sampling.logit_bias or {}
    if bias:
        ids = np.fromiter(bias.keys(), np.int32, len(bias))
        values = np.fromiter(bias.values(), np.float32, len(bias)).view(np.int32)
        draft.uploads += [(BIAS_IDS, slot, 0, ids), (BIAS_VALUES, slot, 0, values)]
