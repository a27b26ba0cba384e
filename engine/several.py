"""Several decode steps in one program, where a step costs the host more than the device.

A dispatch costs the host a millisecond or two, whatever the program does; a small model decodes
faster than that. So a decode step whose next ones need no plan takes these along: one program runs
them, and each is a flight of its own, harvested in its turn. What a row does after its end is known
to the device, which leaves it idle. Host code: no jax, no clock.
"""

import numpy as np

from octavo.engine.host import Flight, Host, Launch, Limits
from octavo.engine.scheduler import advance, needs


def extend(lanes: list[Host], launch: Launch | None) -> None:
    """Add the steps that follow `launch` to it, where nothing could happen between them."""
    steps = lanes[0].limits.steps
    if launch is None or not _may(lanes[0].limits, launch):
        return
    if any(_somebody_waits(host) for host in lanes):
        return
    # Nobody would decode in the last of the steps: the end of a batch is run one by one.
    if not any((host.decoding & (host.sent + steps <= host.limit)).any() for host in lanes):
        return
    if any(_most_pages(host, steps - 1) > pool.bound for host in lanes for pool in host.pools):
        return
    for host, share in zip(lanes, launch.parts, strict=True):
        share.flight.parts = steps
        for part in range(1, steps):
            share.followers.append(_follow(host, share.flight, part))


def _may(limits: Limits, launch: Launch) -> bool:
    """Whether the step is plain decoding."""
    plain = not (launch.tokens or launch.rich or launch.masked)
    return plain and launch.rows in limits.several_rows


def _somebody_waits(host: Host) -> bool:
    """Whether somebody could begin, or go on with a prompt, or must stop, with the next plan."""
    if host.prefilling or host.stopping:
        return True
    return bool(host.free_slots) and host.peek() is not None


def _most_pages(host: Host, steps: int) -> int:
    """The most pages that the rows take in that many steps, should all of them go on."""
    mask = host.limits.dims.page_size - 1
    position = host.sent[host.decoding, None] + np.arange(steps)
    return int(np.count_nonzero((position & mask) == 0))


def _follow(host: Host, leader: Flight, part: int) -> Flight:
    """One more step of the leader's rows, and the mirrors after it."""
    decoding = host.decoding.copy()
    take = needs(host, [], decoding)
    flight = Flight(
        rows=leader.rows,
        serials=leader.serials.copy(),
        sequences=leader.sequences,
        decoding=decoding[: leader.rows],
        chunks=[],
        takes=[take] * len(host.pools),
        stops=[],
        windows=[],
        leader=leader,
        part=part,
        parts=leader.parts,
    )
    for pool in host.pools:
        pool.bound -= take
    advance(host, [], decoding)
    host.counters.steps += 1
    return flight
