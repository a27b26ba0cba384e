"""Harvest: a step's results become tokens of requests, pages of rows, names in the index.

It runs a step or more late, so it goes by the flight's own row map and the rows' flags, never by
who is in a row today. Where everybody is still in place, all of it is array work. Host code: no
jax.
"""

from dataclasses import dataclass, field

import numpy as np

from octavo.engine.host import Flight, Host
from octavo.engine.messages import Finish, Logprobs, Start
from octavo.engine.prefix import extend_hashes
from octavo.engine.scheduler import stop
from octavo.engine.sequence import Phase, Sequence
from octavo.engine.state import BY_STOP, FINISHED, LIVE, STOP_IDS


@dataclass
class Harvest:
    """What one step gave."""

    handles: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint32))
    tokens: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    finished: list[Finish] = field(default_factory=list)
    logprobs: list[Logprobs] = field(default_factory=list)
    starts: list[Start] = field(default_factory=list)


@dataclass
class Rows:
    """The result of a flight, on the host."""

    packed: np.ndarray  # i32[4, R] flags, token, logprob bits, length after
    taken: np.ndarray  # i32[G * (2 + capacity)] free_top, count, pages
    # ids i32[R, k], logprobs f32[R, k], rank i32[R], of the named tokens f32[R, M]
    rich: tuple[np.ndarray, ...] = ()
    # ids i32[T, k], logprobs f32[T, k], the targets' f32[T], rank i32[T], of the named f32[T, M]
    scores: tuple[np.ndarray, ...] = ()


def harvest(host: Host, flight: Flight, rows: Rows | None) -> Harvest:
    """Apply the oldest flight's results. rows is None for a flight that only edited."""
    out = Harvest()
    for group, sequence, first in flight.windows:
        if sequence.slot >= 0:
            host.pools[group].advance(sequence.slot, first)
    if rows is not None:
        flags, token = rows.packed[:2]
        live = (flags & LIVE) != 0
        slots = _slots_now(host, flight)
        _collect_pages(host, flight, rows, live, slots)
        _collect_tokens(host, flight, rows, live, slots, out)
        _collect_chunks(host, flight, rows, out)
        flags = _stop_late(host, rows, live, slots, out)
        _finish(host, flight, flags, token, slots, out)
        if host.limits.prefix_caching:
            _name_pages(host)
    else:  # an edit reports nothing: what it pushed is known from the bound
        for g, pool in enumerate(host.pools):
            pool.free = pool.bound + sum(later.takes[g] for later in host.flights)
    _fence(host, flight)
    return out


def _slots_now(host: Host, flight: Flight) -> np.ndarray:
    """i64[R] the slot where each row's sequence is today."""
    slots = np.arange(flight.rows)
    moved = (flight.serials >= 0) & (flight.serials != host.serial[: flight.rows])
    for row in np.flatnonzero(moved).tolist():
        sequence = flight.sequences[row]
        slots[row] = sequence.slot if sequence is not None else -1
    return slots


def _collect_pages(
    host: Host, flight: Flight, rows: Rows, live: np.ndarray, slots: np.ndarray
) -> None:
    """Give each row the pages that it took; they come in the order of the tokens."""
    length = rows.packed[3]
    mask, shift = host.limits.dims.page_size - 1, host.limits.dims.shift
    decoded = live & flight.decoding
    takers = np.flatnonzero(decoded & (((length - 1) & mask) == 0))
    span = len(rows.taken) // len(host.pools)
    for g, pool in enumerate(host.pools):
        free, count = rows.taken[g * span : g * span + 2].tolist()
        pages = rows.taken[g * span + 2 : g * span + 2 + count]
        pool.append(slots[takers], pages[: len(takers)])
        at = len(takers)
        for sequence, start, run, _ in flight.chunks:
            new = ((start + run + mask) >> shift) - ((start + mask) >> shift)
            pool.extend(sequence.slot, pages[at : at + new])
            at += new
        assert at == count, f"the device took {count} pages, the host accounts for {at}"
        pool.free = free
        pool.bound += flight.takes[g] - count
    ran = slots[decoded]
    host.ran[ran] = length[decoded]


def _collect_tokens(
    host: Host, flight: Flight, rows: Rows, live: np.ndarray, slots: np.ndarray, out: Harvest
) -> None:
    """Append the sampled tokens to their sequences."""
    where = slots[live]
    token = rows.packed[1][live]
    host.tokens[where, host.known[where]] = token
    host.known[where] += 1
    heard = ~host.muted[where]
    out.handles = host.handle[where][heard]
    out.tokens = token[heard]
    host.counters.generation_tokens += len(out.tokens)
    if rows.rich:
        ids, values, rank, named = rows.rich
        chosen = rows.packed[2].view(np.float32)
        for row in np.flatnonzero(live & (slots >= 0)).tolist():
            sequence = flight.sequences[row]
            if sequence is None or not sequence.wants_logprobs or host.muted[slots[row]]:
                continue
            out.logprobs.append(
                _logprobs(
                    sequence,
                    int(rows.packed[3][row]),
                    int(rows.packed[1][row]),
                    float(chosen[row]),
                    int(rank[row]),
                    ids[row],
                    values[row],
                    sequence.request.sampling.logprobs or 0,
                    sequence.request.sampling.logprob_token_ids or [],
                    named[row],
                )
            )


def _logprobs(
    sequence: Sequence,
    position: int,
    token: int,
    chosen: float,
    rank: int,
    ids: np.ndarray,
    values: np.ndarray,
    count: int,
    asked: list[int],
    named: np.ndarray,
) -> Logprobs:
    """One position's message; count -1 asks for all that there are."""
    count = len(ids) if count < 0 else min(count, len(ids))
    named = named[: len(asked)]
    return Logprobs(
        handle=sequence.handle,
        position=position,
        tokens=np.concatenate([[token], ids[:count], asked]).astype(np.int32).tobytes(),
        logprobs=np.concatenate([[chosen], values[:count], named]).astype(np.float32).tobytes(),
        rank=rank,
        named=len(asked),
    )


def _collect_chunks(host: Host, flight: Flight, rows: Rows, out: Harvest) -> None:
    """Note how far the prompts are, release children, score prompt tokens."""
    offset = 0
    for sequence, start, count, final in flight.chunks:
        slot = sequence.slot
        host.ran[slot] = start + count
        if rows.scores and sequence.wants_prompt_logprobs:
            _score(sequence, host, rows, start, count, offset, out)
        offset += count
        if final and sequence.serial in host.children:
            release_children(host, sequence)


def _score(
    sequence: Sequence, host: Host, rows: Rows, start: int, count: int, offset: int, out: Harvest
) -> None:
    ids, values, chosen, rank, named = rows.scores
    sampling = sequence.request.sampling
    most, asked = sampling.prompt_logprobs or 0, sampling.prompt_logprob_token_ids or []
    for i in range(count):
        position = start + i + 1
        if position < sequence.prompt_scored or position >= sequence.prompt_len:
            continue
        sequence.prompt_scored = position + 1
        at = offset + i
        token = int(host.tokens[sequence.slot, position])
        out.logprobs.append(
            _logprobs(
                sequence,
                position,
                token,
                float(chosen[at]),
                int(rank[at]),
                ids[at],
                values[at],
                most,
                asked,
                named[at],
            )
        )


def release_children(host: Host, parent: Sequence) -> None:
    """The other choices of a request may start: their prompt's pages are there."""
    for child in host.children.pop(parent.serial, []):
        host.enqueue(child)


def _stop_late(
    host: Host, rows: Rows, live: np.ndarray, slots: np.ndarray, out: Harvest
) -> np.ndarray:
    """End rows whose token is a stop token beyond those that the device checks.

    Returns the rows' flags: a row that ended here for its length ended for its stop token too.
    """
    flags, token = rows.packed[0].copy(), rows.packed[1]
    for row in np.flatnonzero(live & host.watched[slots] & ~host.muted[slots]).tolist():
        slot = int(slots[row])
        sequence = host.occupant[slot]
        assert sequence is not None, f"{slot=} is empty"
        generated = int(host.known[slot]) - sequence.prompt_len
        few = generated < sequence.min_tokens
        if few or int(token[row]) not in sequence.stop_ids[STOP_IDS:]:
            continue
        if flags[row] & FINISHED:
            flags[row] |= BY_STOP
            continue
        out.finished.append(Finish(sequence.handle, "stop", _stop_token(sequence, token[row])))
        host.live.pop(sequence.handle, None)
        if sequence.phase is Phase.RUNNING:
            stop(host, sequence, Phase.STOPPING)
        else:  # its stop is on the way already
            sequence.phase, host.muted[slot] = Phase.STOPPING, True
    return flags


def _finish(
    host: Host,
    flight: Flight,
    flags: np.ndarray,
    token: np.ndarray,
    slots: np.ndarray,
    out: Harvest,
) -> None:
    """Give back the slots of the rows that ended by themselves."""
    for row in np.flatnonzero(flags & FINISHED).tolist():
        sequence, slot = flight.sequences[row], int(slots[row])
        if sequence is None or host.occupant[slot] is not sequence:
            continue
        muted = bool(host.muted[slot])
        reason = "stop" if flags[row] & BY_STOP else "length"
        retire(host, sequence)
        host.stale.append(slot)
        if not muted:
            out.finished.append(Finish(sequence.handle, reason, _stop_token(sequence, token[row])))


def _stop_token(sequence: Sequence, token: int) -> int:
    """The token to report as the reason: one that the request itself named."""
    return int(token) if int(token) in sequence.request.sampling.stop_token_ids else -1


def retire(host: Host, sequence: Sequence) -> None:
    """The sequence is done: its slot and pages are the host's again."""
    if host.limits.prefix_caching:
        _name(host, sequence.slot)
    host.vacate(sequence.slot)
    sequence.phase = Phase.DONE
    if sequence in host.stopping:
        host.stopping.remove(sequence)
    if host.live.get(sequence.handle) is sequence:  # an aborted one's handle may be another's now
        del host.live[sequence.handle]
    if sequence.serial in host.children:
        release_children(host, sequence)


def _fence(host: Host, flight: Flight) -> None:
    """The step that carried a stop is harvested: what it stopped is the host's again."""
    for sequence in flight.stops:
        if sequence.slot < 0:
            continue  # it had finished by itself
        slot = sequence.slot
        if sequence.phase is Phase.PREEMPTING:
            if host.limits.prefix_caching:
                _name(host, slot)
            host.vacate(slot)
            host.enqueue(sequence)
        else:
            retire(host, sequence)
        host.stale.append(slot)


def _name_pages(host: Host) -> None:
    """Put the pages that this step filled into the prefix index."""
    full = host.ran >> host.limits.dims.shift
    for slot in np.flatnonzero((full > host.indexed) & (host.serial >= 0)).tolist():
        _name(host, slot)


def _name(host: Host, slot: int) -> None:
    """Name the full pages of one slot, as far as its tokens are known."""
    sequence = host.occupant[slot]
    assert sequence is not None, f"{slot=} is empty"
    size = host.limits.dims.page_size
    full = min(int(host.ran[slot]), int(host.known[slot])) >> host.limits.dims.shift
    start = int(host.indexed[slot])
    if full <= start:
        return
    tokens = host.tokens[slot, : full * size]
    extend_hashes(sequence.hashes, sequence.root, tokens, full, size)
    for pool in host.pools:
        row, first = pool.rows[slot], int(pool.first[slot])
        for page in range(max(start, first), full):
            pool.index.insert(sequence.hashes[page], int(row[page]))
    host.indexed[slot] = full
