"""Several lanes, one engine: which data shard a request goes to, and what all of them come to.

A lane is one data shard's Host. A request stays where it went, unless it waits there while another
lane has room. Its choices go together, because they share pages. Host code: no jax, no clock.
"""

import numpy as np

from octavo.engine.admission import find_prefix, fits
from octavo.engine.harvest import Harvest
from octavo.engine.host import Host
from octavo.engine.sequence import Phase, Sequence

# A lane may be fuller than the emptiest one by this, or by one slot, for a prefix that it has.
# Without a bound one system prompt would send everybody to one lane.
AHEAD = 0.25


def choose(lanes: list[Host], sequence: Sequence) -> int:
    """The lane with the longest prefix of the prompt, then the emptiest one."""
    if len(lanes) == 1:
        return 0
    loads = [load(host) for host in lanes]
    most = min(loads) + max(AHEAD, 1 / lanes[0].limits.dims.slots)
    near = [lane for lane, full in enumerate(loads) if full < most]
    hits = {lane: find_prefix(lanes[lane], sequence)[0] for lane in near}
    return min(near, key=lambda lane: (-hits[lane], loads[lane], lane))


def load(host: Host) -> float:
    """How full a lane is: the share of its slots or of its pages, above 1 where requests wait."""
    slots = len(host.live) / host.limits.dims.slots
    return max(slots, *(1 - pool.available / (pool.group.pages - 1) for pool in host.pools))


def rebalance(lanes: list[Host]) -> None:
    """Where a lane has room and nobody waits there, take over one who waits elsewhere in vain."""
    if len(lanes) == 1 or not any(host.queue for host in lanes):
        return
    for host in lanes:
        if not host.free_slots or host.peek() is not None or _preempts(host):
            continue
        for other in lanes:
            sequence = other.peek()
            # A choice that came after the first one reads its pages.
            if sequence is None or sequence.parent is not None or _room(other, sequence):
                continue
            if _room(host, sequence):
                other.pop()
                _hand_over(other, host, sequence, lanes.index(host))
                break


def _preempts(host: Host) -> bool:
    """Whether somebody is on the way back to the queue, whom nobody may overtake."""
    return any(s is not None and s.phase is Phase.PREEMPTING for s in host.occupant)


def _room(host: Host, sequence: Sequence) -> bool:
    """Whether the lane has a slot and pages for it."""
    return bool(host.free_slots) and fits(
        host, [], len(sequence.tokens), *find_prefix(host, sequence)
    )


def _hand_over(source: Host, target: Host, sequence: Sequence, lane: int) -> None:
    """A sequence that is in no queue, and the choices that wait for it, belong to `target` now."""
    children = source.children.pop(sequence.serial, [])
    if children:
        target.children[sequence.serial] = children
    for each in (sequence, *children):
        each.lane = lane
        target.live[each.handle] = source.live.pop(each.handle)
    target.enqueue(sequence)


def together(outs: list[Harvest]) -> Harvest:
    """What a step gave in all lanes."""
    if len(outs) == 1:
        return outs[0]
    return Harvest(
        handles=np.concatenate([out.handles for out in outs]),
        tokens=np.concatenate([out.tokens for out in outs]),
        finished=[each for out in outs for each in out.finished],
        logprobs=[each for out in outs for each in out.logprobs],
        starts=[each for out in outs for each in out.starts],
    )
