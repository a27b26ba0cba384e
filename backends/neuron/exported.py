"""What the exporter hands to the linter, the compiler and the runtime: one record a graph.

No jax is imported here: a process that only compiles or runs what was exported needs none.
"""

import math
from dataclasses import dataclass

BYTES = {
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "s16": 2,
    "u16": 2,
    "s32": 4,
    "u32": 4,
    "s64": 8,
    "u64": 8,
    "f8e4m3": 1,
    "f8e4m3fn": 1,
    "f8e5m2": 1,
    "bf16": 2,
    "f16": 2,
    "f32": 4,
    "f64": 8,
}  # bytes of one element, under XLA's names of the types


@dataclass(frozen=True)
class TensorInfo:
    """One input or output of a graph, as one rank sees it."""

    name: str  # the name the runtime binds it by: input0, input1, ...; output0, output1, ...
    shape: tuple[int, ...]  # of one rank
    dtype: str  # XLA's name: a key of BYTES
    leaf: str  # where in the step's trees it belongs: "params.layers[0].down.weight", "state.kv[0]"

    @property
    def nbytes(self) -> int:
        """Bytes of one rank."""
        return math.prod(self.shape) * BYTES[self.dtype]


@dataclass(frozen=True)
class Exported:
    """One graph that is ready for the compiler."""

    name: str  # "decode_r4_c256"
    hlo: bytes  # a serialized HloModuleProto, safe for neuronx-cc; the same for every rank
    inputs: tuple[TensorInfo, ...]  # in the order of the module's parameters
    outputs: tuple[TensorInfo, ...]  # in the order of the elements of the result's tuple
    aliases: tuple[tuple[int, int], ...]  # (output, input): they are one buffer
    ranks: int  # the module runs on that many ranks at once

    @property
    def nbytes(self) -> int:
        """Bytes of all that lies on one rank while the graph runs; aliased outputs count once."""
        shared = {output for output, _ in self.aliases}
        outputs = sum(t.nbytes for i, t in enumerate(self.outputs) if i not in shared)
        return sum(t.nbytes for t in self.inputs) + outputs
