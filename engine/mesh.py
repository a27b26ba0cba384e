"""Where arrays lie and programs run: on one device, or over a mesh of them.

    data     copies of the model, each with its own slots and pages
    expert   \\ one copy of the model, cut: attention, dense layers and vocabulary by both,
    model    / experts by the first, their width by the second

A program over a mesh is one `jax.shard_map` of the whole function, which sees one shard and is
otherwise the program of one device. Slots, pages, plans and results are cut by `data` and the same
on the rest; of the cache every device has its own part (its heads), and how the parts lie in it is
the backend's affair: along the leading axis that every leaf of the state has, they only stand
beside each other.
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
from octavo.models.load import StackFormat, where_it_lies
from octavo.models.registry import Model
from octavo.models.shards import SPLIT, Shards, placed
from octavo.models.tensors import Tensor, array_shape

AXES = ("data", *SPLIT)
ROWS = PartitionSpec("data")  # what belongs to slots: plans, tables, results
STATE = EngineState(slots=ROWS, pages=ROWS, kv=PartitionSpec(AXES))  # type: ignore[arg-type]


def shards_of(sizes: Mapping[str, int]) -> Shards:
    """How a mesh of these sizes cuts one copy of a model."""
    return Shards(model=sizes.get("model", 1), expert=sizes.get("expert", 1))


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
    if count <= cores:
        return AbstractMesh(tuple(shape), AXES)
    if count > len(devices):
        wanted = ",".join(f"{axis}={n}" for axis, n in sizes.items())
        raise ConfigError(
            f"`mesh={wanted}` needs {count} devices, and {len(devices)} are here",
            f"a mesh of at most {len(devices)}",
        )
    return Mesh(np.array(devices[:count]).reshape(shape), AXES)


# send(array, axis): an array to cores that are no devices of jax, cut along axis; None: all of it
Send = Callable[[np.ndarray, int | None], Any]


@dataclass(frozen=True, eq=False)
class Placement:
    """Where a model's arrays lie; the mesh may be None, which is jax's first device."""

    mesh: Any
    model: Model
    stack_format: StackFormat = where_it_lies  # Backend.stack_format
    send: Send | None = None  # Backend.put

    @cached_property
    def params(self) -> Any:
        """The tree of PartitionSpecs of the parameters."""
        return jax.tree.map(lambda t: PartitionSpec(*placed(t)), self.model.tensors)

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
        if self.mesh is None or isinstance(self.mesh, AbstractMesh):
            return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree)

        def part(spec: PartitionSpec, below: Any) -> Any:
            place = NamedSharding(self.mesh, spec)
            return jax.tree.map(
                lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), below
            )

        leaf = lambda x: isinstance(x, PartitionSpec)  # noqa: E731
        return jax.tree.map(part, specs, tree, is_leaf=leaf)

    def put(self, array: np.ndarray) -> jax.Array:
        """Something that belongs to slots, with its leading data axis."""
        if self.send is not None:
            return self.send(array, None)
        if self.mesh is None:
            return jax.device_put(array)
        return jax.device_put(array, NamedSharding(self.mesh, ROWS))

    def put_weight(self, array: np.ndarray, t: Tensor) -> jax.Array:
        """A parameter: each device gets its part."""
        if self.send is not None:
            cut = [d for d, axes in enumerate(placed(t)) if self.mesh is not None and axes]
            return self.send(array, cut[0] if cut else None)
        if self.mesh is None:
            return jax.device_put(array)
        return jax.device_put(array, NamedSharding(self.mesh, PartitionSpec(*placed(t))))

    def abstract_params(self, dtype: Any, where: Any = None) -> Any:
        """The parameters' shapes, and how they lie where that matters.

        where: their sharding, where there is no mesh; jax's own choice without.
        """

        def place(t: Tensor) -> Any:
            own = where
            if self.mesh is not None and not isinstance(self.mesh, AbstractMesh):
                own = NamedSharding(self.mesh, PartitionSpec(*placed(t)))
            if own is None or not t.axes.startswith("L "):
                return own
            return self.stack_format(len(array_shape(t, self.model.sizes)), own)

        return self.model.abstract_params(dtype, place)

    @property
    def key(self) -> object:
        """What decides a program besides its function and shapes, for a name on disk."""
        return None if self.mesh is None else tuple(self.mesh.shape.items())
