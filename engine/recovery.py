"""What happens when a step raises: its donated state is gone, the requests are not.

An empty state takes its place, and every request starts again from its tokens on the host. A second
failure before a request got its next token is fatal, and says why.
"""

import logging

import numpy as np

from octavo.engine.host import Host
from octavo.engine.pool import Pool
from octavo.engine.sequence import Phase

logger = logging.getLogger(__name__)


class EngineFailure(RuntimeError):
    """The engine cannot go on."""


class Recovery:
    """Counts failures, and puts the host back to a state that matches an empty device."""

    def __init__(self, alone: bool = True) -> None:
        """alone: no other host runs the same steps."""
        self.alone = alone
        self.restarts = 0
        self._idle_failure = False

    def step_failed(self, lanes: list[Host], error: Exception) -> None:
        """Requeue everybody. Raises EngineFailure where nothing came between two failures."""
        if not self.alone:  # who knows how far the others came
            raise EngineFailure(
                f"a step failed, which ends an engine of several hosts: "
                f"{type(error).__name__}: {error}"
            ) from error
        known = {s: int(host.known[s.slot]) for host in lanes for s in host.occupant if s}
        inside = list(known)
        stuck = any(s.failed_at >= known[s] for s in inside)
        if stuck or (not inside and self._idle_failure):
            raise EngineFailure(
                f"a step failed again after a restart, with {type(error).__name__}: {error}"
            ) from error
        self._idle_failure = not inside
        self.restarts += 1
        logger.warning(
            "a step failed (%s: %s); its requests start again", type(error).__name__, error
        )
        for sequence in inside:
            sequence.failed_at = known[sequence]
        for host in lanes:
            requeue(host)


def requeue(host: Host) -> None:
    """Every running sequence waits again; no slot, page or name is left from before."""
    dims = host.limits.dims
    inside = [s for s in host.occupant if s is not None]
    for sequence in inside:
        sequence.tokens = host.tokens[sequence.slot, : host.known[sequence.slot]].copy()
        sequence.slot = -1
    host.pools = [Pool(dims, group) for group in dims.groups]
    host.occupant = [None] * dims.slots
    host.free_slots = list(range(dims.slots))
    host.serial[:] = -1
    for array in (host.known, host.sent, host.ran, host.indexed):
        array[:] = np.zeros_like(array)
    for flags in (host.decoding, host.muted, host.special):
        flags[:] = False
    host.prefilling, host.stopping, host.stale = [], [], []
    host.flights.clear()
    for sequence in inside:
        if sequence.phase is Phase.STOPPING:
            sequence.phase = Phase.DONE
        elif sequence.phase is not Phase.DONE:
            host.enqueue(sequence)
