"""Runs exported bytes, as they are, on XLA's CPU client: what neuronx-cc would get, computed."""

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from octavo.backends.neuron.exported import Exported

xla: Any = import_module("jaxlib._jax")  # what jax has no public name for
# It moved after jaxlib 0.10.0.
XlaComputation: Any = getattr(xla, "XlaComputation", None) or getattr(
    import_module("jaxlib._hlo"), "XlaComputation", None
)
DTYPES = {"u8": "uint8", "s32": "int32", "u32": "uint32", "f32": "float32", "bf16": "bfloat16"}


# A test runs a graph a few dozen times, and compiling it well would take three times as long; so
# would fusing the written out passes of the graphs that sample.
QUICK = {"xla_backend_optimization_level": 0}
SAMPLING = ("sample", "masked", "rich")


class Ranks:
    """One array on several devices, a part or a copy on each: what the engine asks of an array."""

    def __init__(self, parts: Sequence[Any]) -> None:
        self.parts = list(parts)
        self.shape, self.dtype = self.parts[0].shape, self.parts[0].dtype

    @staticmethod
    def put(array: Any, axis: int | None, ranks: int) -> "Ranks":
        """Cut along `axis`, or copied."""
        whole = np.asarray(array)
        return Ranks([whole] * ranks if axis is None else np.split(whole, ranks, axis))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.parts[0])

    def copy_to_host_async(self) -> None: ...

    def block_until_ready(self) -> "Ranks":
        return self

    def is_ready(self) -> bool:
        return True

    def is_deleted(self) -> bool:
        return False

    def delete(self) -> None: ...


def compiled(computation: Any, devices: Sequence[Any]) -> Any:
    """An executable of an XlaComputation, one replica a device."""
    module = xla.mlir.xla_computation_to_mlir_module(computation)
    options = xla.CompileOptions()
    options.num_replicas, options.num_partitions = len(devices), 1
    options.device_assignment = xla.DeviceAssignment.create(
        np.arange(len(devices), dtype=np.int32)[:, None]
    )
    options.env_option_overrides = list(QUICK.items())
    if computation.name().startswith(SAMPLING):
        options.env_option_overrides += [("xla_disable_hlo_passes", "fusion")]
    return devices[0].client.compile_and_load(module, xla.DeviceList(tuple(devices)), options)


def load(exported: Exported) -> Callable[..., list[Any]]:
    """run(inputs) -> outputs: arrays, or with several ranks `Ranks`."""
    devices = jax.devices("cpu")[: exported.ranks]
    program = compiled(XlaComputation(exported.hlo), devices)

    def run(inputs: list[Any]) -> list[Any]:
        many = [one.parts if isinstance(one, Ranks) else [one] for one in inputs]
        placed = [
            [_put(array, t.dtype, d) for array, d in zip(each, devices, strict=True)]
            for each, t in zip(many, exported.inputs, strict=True)
        ]
        if exported.ranks == 1:
            return list(program.execute([each[0] for each in placed]))
        # Said to be copies of one array: what a rank gets is what lies on its device.
        whole = NamedSharding(Mesh(np.array(devices), ("rank",)), PartitionSpec())
        make = jax.make_array_from_single_device_arrays
        results = program.execute_sharded([make(e[0].shape, whole, e) for e in placed])
        return [Ranks(each) for each in results.disassemble_into_single_device_arrays()]

    return run


def _put(array: Any, dtype: str, device: Any) -> Any:
    """As jax's own arrays are, so that weights are copied once; what is aliased is used up."""
    if isinstance(array, jax.Array) and array.dtype == DTYPES[dtype]:
        return array if array.devices() == {device} else jax.device_put(array, device)
    value = np.array(array)
    assert value.dtype == DTYPES[dtype] or value.dtype == np.bool_, (value.dtype, dtype)
    return jax.device_put(value.astype(jax.numpy.dtype(DTYPES[dtype])), device)
