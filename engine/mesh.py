"""Where arrays lie and programs run: on one device, or over a mesh of them.

    data     copies of the model, each with its own slots and pages
    stage    of one copy, so many layers on each (stages.py)
    expert   \\ one copy of the model, cut: attention, dense layers and vocabulary by both,
    model    / experts by the first, their width by the second

A program over a mesh is one `jax.shard_map` of the whole function, which sees one shard and is
otherwise the program of one device. Slots, pages, plans and results are cut by `data` and the same
on the rest; of the cache every device has its own part (its layers and heads), and how the parts
lie in it is the backend's affair: along the leading axis that every leaf of the state has, they
only stand beside each other.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from octavo.engine.config import ConfigError
from octavo.engine.state import EngineState
from octavo.models.registry import Model
from octavo.models.shards import SPLIT, STAGE, Shards, kept_places, placed
from octavo.models.tensors import Tensor, kept, kept_shape

AXES = ("data", STAGE, *SPLIT)
ROWS = PartitionSpec("data")  # what belongs to slots: plans, tables, results
STATE = EngineState(slots=ROWS, pages=ROWS, kv=PartitionSpec(AXES))  # type: ignore[arg-type]


def shards_of(sizes: Mapping[str, int]) -> Shards:
    """How a mesh of these sizes cuts one copy of a model."""
    return Shards(**{axis: sizes.get(axis, 1) for axis in (*SPLIT, STAGE)})


def make_mesh(
    sizes: Mapping[str, int], devices: Sequence[Any], cores: int = 0
) -> Mesh | AbstractMesh | None:
    """The mesh over the first devices; None where it is one device. Raises ConfigError.

    cores: how many there are that are no devices of jax.
    """
    shape = [sizes.get(axis, 1) for axis in AXES]
    count = int(np.prod(shape))
    if count == 1:
        return None
    wanted = ",".join(f"{axis}={n}" for axis, n in sizes.items())
    if cores and sizes.get("data", 1) > 1:
        raise ConfigError(
            f"`mesh={wanted}` copies the model, and graphs for these cores only cut it",
            "use --mesh model=N, and a server for each copy of the model",
        )
    if cores and sizes.get(STAGE, 1) > 1:
        raise ConfigError(
            f"`mesh={wanted}` cuts `stage`, and graphs for these cores have all layers",
            "use --mesh model=N",
        )
    if count <= cores:
        return AbstractMesh(tuple(shape), AXES)
    if count > len(devices):
        raise ConfigError(
            f"`mesh={wanted}` needs {count} devices, and {len(devices)} are here",
            f"a mesh of at most {len(devices)}",
        )
    return Mesh(np.array(devices[:count]).reshape(shape), AXES)


@dataclass(frozen=True, eq=False)
class Placement:
    """Where a model's arrays lie; the mesh may be None, which is one device."""

    mesh: Any
    model: Model
    here: Any = None  # without a mesh: the device's sharding where programs must name it
    put_here: Callable[..., Any] = jax.device_put  # Backend.put, without a mesh of devices

    @cached_property
    def params(self) -> Any:
        """The tree of PartitionSpecs of the parameters."""
        return jax.tree.map(lambda t: PartitionSpec(*kept_places(t)), self.model.tensors)

    @cached_property
    def head(self) -> Any:
        """Those of the part that logits read."""
        return self.model.head(self.params)

    def program(self, function: Callable[..., Any], ins: tuple[Any, ...], out: Any) -> Any:
        """`function` of one shard as a function of all; ins and out are trees of PartitionSpecs."""
        if self.mesh is None:
            return function
        return jax.shard_map(function, mesh=self.mesh, in_specs=ins, out_specs=out, check_vma=False)

    def abstract(self, tree: Any, specs: Any) -> Any:
        """The ShapeDtypeStructs of `tree`, with the places of `specs` (a prefix of it)."""

        def part(spec: PartitionSpec, below: Any) -> Any:
            place = self._sharding(spec)
            return jax.tree.map(
                lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), below
            )

        leaf = lambda x: isinstance(x, PartitionSpec)  # noqa: E731
        return jax.tree.map(part, specs, tree, is_leaf=leaf)

    def _sharding(self, spec: PartitionSpec) -> Any:
        alone = self.mesh is None or self.cores
        return self.here if alone else NamedSharding(self.mesh, spec)

    @property
    def cores(self) -> bool:
        """Whether the mesh is of cores that are no devices of jax."""
        return isinstance(self.mesh, AbstractMesh)

    def put(self, array: np.ndarray) -> jax.Array:
        """Something that belongs to slots, with its leading data axis."""
        if self.mesh is None or self.cores:
            return self.put_here(array)
        return self._put(array, ROWS)

    def put_weight(self, array: np.ndarray, tensor: Tensor) -> jax.Array:
        """A parameter: each device gets its part."""
        if self.mesh is None:
            return self.put_here(kept(tensor, array))
        if self.cores:
            along = [d for d, axes in enumerate(placed(tensor.axes)) if axes]
            return self.put_here(array, along[0] if along else None)
        cut = NamedSharding(self.mesh, PartitionSpec(*placed(tensor.axes)))
        if not (tensor.flat or tensor.columns):
            return self._put(array, cut.spec)
        # Each device's part is laid out by itself: gate and up of its columns side by side.
        parts = [
            jax.device_put(kept(tensor, part), device)
            for device, index in cut.addressable_devices_indices_map(array.shape).items()
            for part in [array[index]]
        ]
        place = NamedSharding(self.mesh, PartitionSpec(*kept_places(tensor)))
        shape = kept_shape(tensor, array.shape)
        return jax.make_array_from_single_device_arrays(shape, place, parts)

    def _put(self, array: np.ndarray, spec: PartitionSpec) -> jax.Array:
        place = NamedSharding(self.mesh, spec)
        if self.mesh.is_multi_process:  # device_put would ask the other hosts if theirs is equal
            return jax.make_array_from_callback(array.shape, place, lambda part: array[part])
        return jax.device_put(array, place)

    @property
    def key(self) -> object:
        """What decides a program besides its function and shapes, for a name on disk."""
        if self.mesh is None:
            return None
        hosts = (jax.process_count(), jax.process_index()) if self.mesh.is_multi_process else ()
        return (*self.mesh.shape.items(), *hosts)

    @property
    def shards(self) -> int:
        """How often the leading axis of what belongs to slots is cut."""
        return 1 if self.mesh is None else self.mesh.shape["data"]
