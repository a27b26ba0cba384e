"""The one place where the host reads the device.

Every read is counted. A read that finds its result ready costs nothing; one that waits while a
later step is in flight only paces the host; one that waits with nothing behind it lets the device
idle, and is a stall.
"""

import time
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np


@dataclass
class ReadCounts:
    """Reads since start, and the seconds they took."""

    ready: int = 0
    paced: int = 0
    stalls: int = 0
    waited: float = 0.0


class Reader:
    """Copies device arrays to the host and counts how."""

    def __init__(self) -> None:
        self.counts = ReadCounts()

    def expect(self, arrays: Any) -> None:
        """Start the copies now, so that a later `read` finds them done."""
        for array in jax.tree.leaves(arrays):
            array.copy_to_host_async()

    def read(self, arrays: Any, *, behind: int) -> Any:
        """The arrays as numpy. `behind`: steps in flight that were dispatched after these."""
        leaves = jax.tree.leaves(arrays)
        if all(leaf.is_ready() for leaf in leaves):
            self.counts.ready += 1
        elif behind:
            self.counts.paced += 1
        else:
            self.counts.stalls += 1
        began = time.perf_counter()
        out = jax.tree.map(np.asarray, arrays)
        self.counts.waited += time.perf_counter() - began
        return out
