"""The schedule of one step: decode everything that runs, spend the rest of the budget on prompts.

    stops -> returned pages -> continue prompts -> admit -> make room -> pick the buckets

Strict order within a lane: nobody overtakes a prompt that waits for a slot or for pages. `schedule`
changes the mirrors of all lanes and returns a Launch, or None when nothing can be dispatched now.
Host code: no jax, no clock.
"""

from dataclasses import dataclass, field

import numpy as np

from octavo.engine.admission import admit
from octavo.engine.host import Flight, Host, Launch, Part
from octavo.engine.plan import MOVES, Chunk, Draft
from octavo.engine.sequence import Phase, Sequence

# Finished rows are cleared lazily: an edit of their own is worth it only for many pages at once.
LAZY_RETURNS = 256
# Prompt tokens from which a step's time grows with them, and the fill that a bucket must have then.
TRIM_FROM, TRIM_FILL = 512, 0.85


@dataclass(eq=False, slots=True)
class _Share:
    """What one lane wants of a step."""

    host: Host
    draft: Draft
    chunks: list[tuple[Sequence, int, int, bool]]
    stuck: bool = False  # the pages are not surely there before a harvest
    windows: list[tuple[int, Sequence, int]] = field(default_factory=list)


def schedule(lanes: list[Host]) -> Launch | None:
    """Decide the next step, or None: nothing to do, or the pages must come back first.

    All lanes run the same program, and what decodes on the device decodes in every pass: so one
    lane that must wait for pages makes the others wait with it.
    """
    limits = lanes[0].limits
    turn = limits.apart and lanes[0].ran_prompts and any(host.decoding.any() for host in lanes)
    shares = [_share(host, turn) for host in lanes]
    if any(share.stuck for share in shares):
        return _wait(shares)
    if not any(share.chunks or share.host.decoding.any() for share in shares):
        return _edit_only(shares) if any(host.stopping for host in lanes) else None
    return _launch(shares)


def _share(host: Host, turn: bool) -> _Share:
    """Continue prompts, admit, make room. turn: it is the turn of those who decode."""
    share = _Share(host, Draft(returned=[[] for _ in host.pools]), [])
    if not turn:
        budget = host.limits.token_buckets[-1]
        budget -= _continue_prompts(host, share.chunks, budget)
        admit(host, share.draft, share.chunks, budget)
        _trim(host, share.chunks)
    share.stuck = not make_room(host, share.chunks)
    return share


def _wait(shares: list[_Share]) -> Launch | None:
    """Nobody runs: victims' stops and pages on their way travel alone, and admissions with them."""
    stuck = [share for share in shares if share.stuck]
    for share in stuck:
        share.windows = _windows(share.host, share.draft, least=1)
    due = any(share.draft.edits() or share.host.stopping for share in shares)
    if due or any(pool.returns for share in stuck for pool in share.host.pools):
        return _edit_only(shares)
    stuck[0].host.counters.waits += 1
    return None


def needs(host: Host, chunks: list[tuple[Sequence, int, int, bool]], decoding: np.ndarray) -> int:
    """The most pages, per group, that a step with these chunks and decode rows (bool[B]) takes."""
    mask, shift = host.limits.dims.page_size - 1, host.limits.dims.shift
    pages = int(np.count_nonzero(decoding & ((host.sent & mask) == 0)))
    for _, start, count, _ in chunks:
        pages += ((start + count + mask) >> shift) - ((start + mask) >> shift)
    return pages


def _continue_prompts(
    host: Host, chunks: list[tuple[Sequence, int, int, bool]], budget: int
) -> int:
    """Give the next chunk to prompts that are under way; returns the tokens used."""
    used = 0
    for sequence in host.prefilling:
        start = int(host.sent[sequence.slot])
        left = int(host.known[sequence.slot]) - start
        count = min(left, budget - used)
        if count <= 0 or len(chunks) == host.limits.dims.chunks:
            break
        chunks.append((sequence, start, count, count == left))
        used += count
    return used


def _trim(host: Host, chunks: list[tuple[Sequence, int, int, bool]]) -> None:
    """Leave the end of the last prompt to the next step, where padding would cost more than it.

    Large steps cost by their tokens, padding included; small ones cost the same whatever they hold.
    """
    buckets, tokens = host.limits.token_buckets, sum(count for _, _, count, _ in chunks)
    below = max((b for b in buckets if b <= tokens), default=0)
    excess = tokens - below
    if below < TRIM_FROM or not excess or tokens > TRIM_FILL * bucket(buckets, tokens):
        return
    sequence, start, count, _ = chunks[-1]
    if excess < count:
        chunks[-1] = (sequence, start, count - excess, False)


def make_room(host: Host, chunks: list[tuple[Sequence, int, int, bool]]) -> bool:
    """See to it that this step's pages are surely free: evict, drop chunks, then preempt.

    False: not before a harvest. Victims were marked, and their stops are to be sent.
    """
    most = host.limits.dims.returns
    while True:
        need = needs(host, chunks, host.decoding)
        for pool in host.pools:
            pool.evict(need - pool.bound - len(pool.returns))
        short = {
            g
            for g, pool in enumerate(host.pools)
            if need > pool.bound + min(len(pool.returns), most)
        }
        if not short:
            return True
        if _coming_back(host, short):
            return False
        victim = _victim(host)
        if victim is None:
            return False
        host.counters.preemptions += 1
        chunks[:] = [chunk for chunk in chunks if chunk[0] is not victim]
        stop(host, victim, Phase.PREEMPTING)


def _coming_back(host: Host, short: set[int]) -> bool:
    """Whether the groups that are short get pages without anybody being preempted for them."""
    if any(len(pool.returns) > host.limits.dims.returns for pool in host.pools):
        return True
    if any(s.phase is Phase.STOPPING or s.phase is Phase.PREEMPTING for s in _inside(host)):
        return True
    if any(flight.stops for flight in host.flights):
        return True
    behind = _behind_windows(host, least=1)
    behind += [window for flight in host.flights for window in flight.windows]
    return any(g in short for g, _, _ in behind)


def stop(host: Host, sequence: Sequence, phase: Phase) -> None:
    """Take a sequence out at the next plan; slot and pages return with that plan's harvest."""
    sequence.phase = phase
    host.decoding[sequence.slot] = False
    host.muted[sequence.slot] = phase is Phase.STOPPING
    if sequence in host.prefilling:
        host.prefilling.remove(sequence)
    host.stopping.append(sequence)


def _inside(host: Host) -> list[Sequence]:
    return [s for s in host.occupant if s is not None]


def _victim(host: Host) -> Sequence | None:
    """The youngest of the lowest priority; never the oldest, so that somebody always gets done."""
    running = [s for s in _inside(host) if s.phase is Phase.RUNNING]
    if host.limits.by_priority:
        running.sort(key=lambda s: s.order)
    else:
        running.sort(key=lambda s: s.serial)
    return running[-1] if len(running) > 1 else None


def _compact(host: Host, draft: Draft, decoding: np.ndarray) -> None:
    """Move the highest rows down where that makes the bucket smaller."""
    if not host.free_slots:
        return
    busy = np.flatnonzero(host.serial >= 0)
    if not len(busy):
        return
    buckets = host.limits.row_buckets
    top = int(busy[-1]) + 1
    if bucket(buckets, len(busy)) >= bucket(buckets, top):
        return
    for src in busy[::-1].tolist():
        dst = host.free_slots[0] if host.free_slots else src
        sequence = host.occupant[src]
        assert sequence is not None, f"{src=}"
        fixed = sequence.phase is not Phase.RUNNING or sequence in host.prefilling
        fresh = any(a.slot == src for a in draft.admissions)
        if dst >= src or fixed or fresh or len(draft.moves) == MOVES:
            return
        host.move(src, dst)
        decoding[dst], decoding[src] = decoding[src], False
        draft.moves.append((src, dst))


def bucket(buckets: tuple[int, ...], count: int) -> int:
    """The smallest bucket that holds `count`."""
    return next(b for b in buckets if b >= count)


def _edits(host: Host, draft: Draft, *, force: bool) -> list[Sequence]:
    """Fill the plan's stops and returned pages; `force` where this step counts on the pages."""
    stops, host.stopping = host.stopping, []
    draft.stops = [s.slot for s in stops]
    pending = sum(len(pool.returns) for pool in host.pools)
    most = host.limits.dims.returns
    if pending and (force or draft.edits() or pending >= LAZY_RETURNS or _tight(host)):
        draft.returned = [pool.take_returns(most) for pool in host.pools]
    if draft.edits() and host.stale:
        admitted = {a.slot for a in draft.admissions} | {dst for _, dst in draft.moves}
        free = [s for s in host.stale if host.occupant[s] is None and s not in admitted]
        draft.stops = draft.stops + free
        host.stale = []
    return stops


def _tight(host: Host) -> bool:
    """Whether the returns are worth a plan of their own now."""
    return any(pool.bound < host.limits.dims.slots + len(pool.returns) for pool in host.pools)


def _behind_windows(host: Host, least: int) -> list[tuple[int, Sequence, int]]:
    """(group, sequence, first) of rows where all harvested queries left `least` pages behind."""
    behind: list[tuple[int, Sequence, int]] = []
    for g, pool in enumerate(host.pools):
        if not pool.group.window:
            continue
        first = np.maximum(host.ran - pool.group.window + 1, 0) >> pool.shift
        gain = np.where(host.serial >= 0, first - pool.sent_first, 0)
        for slot in np.flatnonzero(gain >= least).tolist():
            sequence = host.occupant[slot]
            if sequence is not None and sequence.phase is Phase.RUNNING:
                behind.append((g, sequence, int(first[slot])))
    return behind


def _windows(host: Host, draft: Draft, least: int) -> list[tuple[int, Sequence, int]]:
    """Give those pages back with this plan."""
    moved = _behind_windows(host, least)
    for g, sequence, first in moved:
        host.pools[g].sent_first[sequence.slot] = first
        draft.windows.append((g, sequence.slot, first))
    return moved


def _edit_only(shares: list[_Share]) -> Launch:
    """A step that runs nothing: it only carries edits."""
    parts = []
    for share in shares:
        flight = Flight(
            rows=0,
            serials=np.zeros(0, np.int64),
            sequences=[],
            decoding=np.zeros(0, np.bool_),
            chunks=[],
            takes=[0] * len(share.host.pools),
            stops=_edits(share.host, share.draft, force=True),
            windows=share.windows,
        )
        parts.append(Part(share.draft, flight))
    return Launch(parts, 0, 0)


def _launch(shares: list[_Share]) -> Launch:
    """Pick the buckets, fill the plans, and advance the mirrors to after this step."""
    limits = shares[0].host.limits
    sums = [sum(count for _, _, count, _ in share.chunks) for share in shares]
    tokens = bucket(limits.token_buckets, max(sums)) if any(sums) else 0
    every = [_decoding(share, tokens) for share in shares]
    touched = max(map(_touched, shares, every))
    rows = bucket(limits.row_buckets if not tokens else limits.row_buckets[-1:], touched)
    launch = Launch([], rows, tokens, greedy=True)
    contexts = []
    for share, decoding in zip(shares, every, strict=True):
        host, chunks = share.host, share.chunks
        _ask(launch, share, decoding)
        contexts.append(_context(host, chunks, decoding))
        launch.parts.append(_part(share, decoding, rows, tokens))
        advance(host, chunks, decoding)
        host.counters.steps += 1
        host.ran_prompts = bool(tokens)
    launch.context = max(contexts) if all(contexts) else 0
    return launch


def _decoding(share: _Share, tokens: int) -> np.ndarray:
    """bool[B] the rows that decode in this step, after they were moved together."""
    host = share.host
    if host.limits.apart and tokens:
        return np.zeros_like(host.decoding)
    decoding = host.decoding.copy()
    _compact(host, share.draft, decoding)  # from here on the draft is surely sent
    return decoding


def _touched(share: _Share, decoding: np.ndarray) -> int:
    """Rows up to the last that this step runs."""
    (rows,) = decoding.nonzero()
    last = int(rows[-1]) if len(rows) else 0
    return 1 + max(last, *(sequence.slot for sequence, *_ in share.chunks), 0)


def _ask(launch: Launch, share: _Share, decoding: np.ndarray) -> None:
    """Note in the launch what this lane needs of its programs."""
    host, rows = share.host, launch.rows
    finals = [s for s, _, _, final in share.chunks if final]
    special = bool((host.special[:rows] & decoding[:rows]).any())
    asking = [s for s in host.occupant[:rows] if s is not None] if special else []
    asking += finals
    launch.rich |= any(s.wants_logprobs for s in asking)
    launch.masked |= any(s.masked for s in asking)
    launch.scored |= any(s.wants_prompt_logprobs for s, _, _, _ in share.chunks)
    launch.greedy &= not bool((host.choosy[:rows] & decoding[:rows]).any())
    launch.greedy &= not any(s.choosy for s in finals)


def _part(share: _Share, decoding: np.ndarray, rows: int, tokens: int) -> Part:
    """Fill one lane's plan and flight, and subtract the pages that it takes."""
    host, draft, chunks = share.host, share.draft, share.chunks
    windows = _windows(host, draft, least=1 if _tight(host) or draft.edits() else 4)
    take = needs(host, chunks, decoding)
    stops = _edits(host, draft, force=any(take > pool.bound for pool in host.pools))
    for sequence, start, count, final in chunks:
        draft.chunks.append(Chunk(sequence.slot, start, count, final))
    for pool in host.pools:
        pool.bound -= take
    flight = Flight(
        rows=rows,
        tokens=tokens,
        serials=host.serial[:rows].copy(),
        sequences=host.occupant[:rows],
        decoding=decoding[:rows],
        chunks=chunks,
        takes=[take] * len(host.pools),
        stops=stops,
        windows=windows,
    )
    return Part(draft, flight)


def _context(
    host: Host, chunks: list[tuple[Sequence, int, int, bool]], decoding: np.ndarray
) -> int:
    """The pages that this step's programs must look at; 0 is all."""
    buckets, mask = host.limits.context_buckets, host.limits.dims.page_size - 1
    if len(buckets) < 2:
        return 0
    longest = int(np.max(host.sent, where=decoding, initial=0)) + 1
    longest = max(longest, *(start + count for _, start, count, _ in chunks), 0)
    pages = bucket(buckets, (longest + mask) >> host.limits.dims.shift)
    return 0 if pages == buckets[-1] else pages


def advance(
    host: Host, chunks: list[tuple[Sequence, int, int, bool]], decoding: np.ndarray
) -> None:
    """The mirrors after this step is dispatched."""
    host.sent += decoding
    # After a decode step a row has sent + 1 tokens: at its limit it has finished, and we know it.
    host.decoding &= ~(decoding & (host.sent + 1 >= host.limit))
    for sequence, start, count, final in chunks:
        slot = sequence.slot
        host.sent[slot] = start + count
        host.counters.prompt_tokens += count
        if final:
            host.prefilling.remove(sequence)
            host.decoding[slot] = start + count + 1 < sequence.limit
