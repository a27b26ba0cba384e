"""Compile for TPUs on a machine that has none, and read the schedules that libtpu writes.

A bundle of a schedule is about a cycle; waits for copies are not in it. The environment must be
set before jax is imported (`environment`), so that callers run a process of their own for it.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import octavo

ENVIRONMENT = {  # libtpu looks for no TPU then
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no device to share
}
SPILL = 8  # the column of stores of spilled registers
BRANCH = 5  # bundles from a branch to its target
NO_LIBTPU = "libtpu is not installed here; `make aot` makes an environment that has it"


@dataclass(frozen=True)
class Chip:
    """One TensorCore of a kind of TPU."""

    topology: str
    ghz: float
    gb_per_s: float  # of HBM, its share

    def copy_cycles(self, count: float) -> float:
        """Cycles that `count` bytes take from HBM."""
        return count / self.gb_per_s * self.ghz


CHIPS = {
    "v5e": Chip("v5e:2x2", 1.5, 819),
    "v5p": Chip("v5p:2x2x1", 1.75, 2765 / 2),
    "v6e": Chip("v6e:2x2", 1.75, 1640),
    "tpu7x": Chip("tpu7x:2x2x1", 2.2, 3690),
}


def libtpu_version() -> str | None:
    """The installed libtpu's, or None."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("libtpu")
    except PackageNotFoundError:
        return None


def environment(dump: Path) -> dict[str, str]:
    """Of a process that compiles for TPUs and writes the schedules to the folder `dump`."""
    here = str(Path(octavo.__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH", "")]))
    flags = {"LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={dump}", "PYTHONPATH": path}
    return {**os.environ, **ENVIRONMENT, **flags}


def compile_for(chip: str, function: Any, arguments: Any, donate: Any = ()) -> Any:
    """The program of `function` for one core of `chip`; arguments are abstract arrays."""
    import jax
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

    described = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip].topology)
    mesh = Mesh(np.array(described.devices[:1]), ("model",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec())
    placed = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), arguments
    )
    with jax.set_mesh(mesh):
        return jax.jit(function, donate_argnums=donate).lower(*placed).compile()


class Schedule:
    """The newest schedule of a kernel in a folder of dumps."""

    def __init__(self, folder: Path, kernel: str) -> None:
        found = [
            path
            for path in folder.glob(f"*-{kernel}.*final_bundles.txt")
            if "schedule-analysis" not in path.name
        ]
        if not found:
            raise FileNotFoundError(f"libtpu wrote no schedule of {kernel} to {folder}")
        newest = max(found, key=lambda path: path.name)
        self.dots: list[int] = []  # matrix products, by address
        self.branches: list[tuple[int, int]] = []  # from, to
        self.spills = 0
        self.bundles = 0
        self._read(newest.read_text().splitlines())
        uses = max(folder.glob(f"*-{kernel}.*final_hlo-static-per-bundle-util*"), key=str)
        rows = uses.read_text().split("UTILIZATION:")[1].split("\n")
        self.spills = sum(int(row.split()[SPILL]) for row in rows if row.strip())

    def _read(self, lines: list[str]) -> None:
        start: dict[str, int] = {}  # of a region
        jumps = []
        for line in lines:
            at = re.match(r" *(0x[0-9a-f]+|0) +(?:[A-Z]{2})? *:", line)
            if at is None:
                continue
            address = int(at[1], 16)
            self.bundles = max(self.bundles, address + 1)
            if re.search(r"= v(matmul|dot)", line):
                self.dots.append(address)
            for region in re.findall(r"Start(?:/End empty)? region (\d+)", line):
                start[region] = address
            jump = re.search(r"sbr\.rel .*?target = \$region(\d+)", line)
            if jump:
                jumps.append((address, jump[1]))
        self.branches = [(a, start[region]) for a, region in jumps if region in start]

    def loops(self) -> list[tuple[int, int]]:
        """First and last bundle of each loop that multiplies matrices, the smallest first."""
        found = [(to, at + BRANCH - 1) for at, to in self.branches if to < at]
        busy = [loop for loop in found if any(loop[0] <= dot <= loop[1] for dot in self.dots)]
        return sorted(busy, key=lambda loop: loop[1] - loop[0])

    def hot_path(self, loop: tuple[int, int]) -> int:
        """Bundles of the shortest way through a loop that leaves out no matrix product."""
        begin, end = loop
        jumps = {
            at: to
            for at, to in self.branches
            if begin <= at < to <= end and not any(at + BRANCH <= dot < to for dot in self.dots)
        }
        cost = {end: 1}
        for at in range(end - 1, begin - 1, -1):
            cost[at] = 1 + cost[at + 1]
            if at in jumps:
                cost[at] = min(cost[at], BRANCH + cost[jumps[at]])
        return cost[begin]
