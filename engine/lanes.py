"""Several lanes, one engine: which data shard a request goes to, and what all of them come to.

A lane is one data shard's Host. A request stays where it went: its choices share its pages, and a
preempted one finds its own again. Host code: no jax, no clock.
"""

import numpy as np

from octavo.engine.admission import find_prefix
from octavo.engine.harvest import Harvest
from octavo.engine.host import Host
from octavo.engine.sequence import Sequence

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
