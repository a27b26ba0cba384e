"""Several decode steps in one program, where a step costs the host more than the device.

A dispatch costs the host a millisecond or two, whatever the program does; a small model decodes
faster than that. So a decode step whose next ones need no plan takes these along: one program runs
them, and each is a flight of its own, harvested in its turn. What a row does after its end is known
to the device, which leaves it idle. Host code: no jax, no clock.
"""

import numpy as np

from octavo.engine.host import Flight, Host, Launch
from octavo.engine.scheduler import advance, needs


def extend(host: Host, launch: Launch | None) -> None:
    """Add the steps that follow `launch` to it, where nothing could happen between them."""
    steps = host.limits.steps
    if launch is None or not _may(host, launch):
        return
    # Nobody would decode in the last of the steps: the end of a batch is run one by one.
    if not (host.decoding & (host.sent + steps <= host.limit)).any():
        return
    if any(_most_pages(host, steps - 1) > pool.bound for pool in host.pools):
        return
    launch.flight.parts = steps
    for part in range(1, steps):
        launch.followers.append(_follow(host, launch.flight, part))


def _may(host: Host, launch: Launch) -> bool:
    """Whether the step is plain decoding, and neither prompts nor stops wait for the next plan."""
    if launch.rows not in host.limits.several_rows or launch.tokens or launch.rich:
        return False
    return not host.prefilling and not host.stopping and host.peek() is None


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
