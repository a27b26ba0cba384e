"""Compile for TPUs on a machine that has none, and read the schedules.

libtpu compiles for a described topology, and writes the instruction bundles of each kernel to a
folder. A bundle is about a cycle; waits for copies are not in it.

    python -m bench.tpu_compile v6e:2x2 decode bfloat16 16     prints what one kernel takes
"""

from dataclasses import dataclass
from typing import Any

ENVIRONMENT = {  # libtpu looks for no TPU then
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


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


@dataclass(frozen=True)
class Block:
    """A basic block of a schedule: bundles without a branch between them."""

    begin: int
    bundles: int
    dots: int  # matrix instructions


def compile_for(topology: str, function: Any, arguments: Any, donate: Any = ()) -> Any:
    """The program of `function` for one chip of `topology`; arguments are abstract arrays."""
    import jax
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

    described = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    mesh = Mesh(np.array(described.devices[:1]), ("model",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec())
    placed = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), arguments
    )
    with jax.set_mesh(mesh):
        return jax.jit(function, donate_argnums=donate).lower(*placed).compile()
