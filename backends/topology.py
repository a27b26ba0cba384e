"""TPUs that are not here: libtpu describes them, and compiles for what it describes."""

import os
from importlib.util import find_spec
from typing import Any

import jax

from octavo.backends.chips import Chip
from octavo.backends.record import BackendError

# libtpu asks nobody which machine this is then, and may be loaded beside another process's.
SURROUNDINGS = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def chips_of(chip: Chip, topology: str) -> tuple[int, ...]:
    """ "2x4" as (2, 4). Raises BackendError where that chip comes in no such form."""
    if topology not in chip.topologies:
        what = f"no topology {topology}" if topology else "no topology of its own"
        raise BackendError(
            f"{chip.name} has {what}; write one of "
            + ", ".join(f"{chip.name}:{name}" for name in chip.topologies)
        )
    return tuple(map(int, topology.split("x")))


def devices_of(chip: Chip, topology: str) -> tuple[jax.Device, ...]:
    """The devices of a topology, to compile for. Raises BackendError without libtpu."""
    chips = chips_of(chip, topology)
    if find_spec("libtpu") is None:
        raise BackendError(
            "libtpu, which compiles for TPUs without one, is not installed here; "
            "pip install 'octavo[tpu]'"
        )
    for name, value in SURROUNDINGS.items():
        os.environ.setdefault(name, value)
    jax.config.update("jax_platforms", "cpu")  # jax would look for a TPU of this machine
    from jax.experimental import topologies

    bounds: dict[str, Any] = {}
    if len(chips) * [1] == list(chips):  # one chip is less than the hosts that libtpu knows
        bounds["chips_per_host_bounds"] = [1, 1, 1]
    described = topologies.get_topology_desc(
        platform="tpu", topology_name=f"{chip.name}:{topology}", **bounds
    )
    return tuple(described.devices)
