"""HLO modules as Python objects: enough of HloModuleProto to lint one and to make it safe.

The numbers are those of XLA's `hlo.proto` and `xla_data.proto`. Fields that nobody here reads stay
in `Instruction.rest` and are written back as they came.
"""

from dataclasses import dataclass, field
from functools import lru_cache

from octavo.backends.neuron.wire import Message

TYPES = {
    1: "pred",
    2: "s8",
    3: "s16",
    4: "s32",
    5: "s64",
    6: "u8",
    7: "u16",
    8: "u32",
    9: "u64",
    10: "f16",
    11: "f32",
    12: "f64",
    13: "tuple",
    14: "opaque",
    15: "c64",
    16: "bf16",
    17: "token",
    18: "c128",
    19: "f8e5m2",
    20: "f8e4m3fn",
    21: "s4",
    22: "u4",
    28: "f8e4m3",
}
CODES = {name: code for code, name in TYPES.items()}

# Fields of HloInstructionProto that become attributes of Instruction.
NAME, OPCODE, SHAPE, METADATA, LITERAL, PARAMETER = 1, 2, 3, 7, 8, 9
TUPLE_INDEX, DIMENSIONS, SLICE, WINDOW, DYNAMIC_SLICE_SIZES = 13, 14, 17, 15, 20
CHANNEL, TARGET, GATHER, GATHER_SIZES, ID = 26, 28, 33, 34, 35
OPERANDS, CONTROL, CALLED, DOT = 36, 37, 38, 30
SHARDING, BACKEND_CONFIG, SCATTER, GROUPS, COMPARISON = 40, 43, 48, 49, 63
FRONTEND, GLOBAL_IDS, DEVICE_LIST, STATISTICS, ORIGINAL = 68, 71, 87, 82, 88
KNOWN = (NAME, OPCODE, SHAPE, METADATA, PARAMETER, TUPLE_INDEX, ID, OPERANDS, CONTROL, CALLED)


@dataclass(frozen=True)
class Shape:
    """Of one array, or of a tuple."""

    dtype: str
    dims: tuple[int, ...] = ()
    parts: tuple["Shape", ...] = ()  # of a tuple
    dynamic: bool = False

    @staticmethod
    @lru_cache(maxsize=4096)  # a graph has thousands of operations, and few shapes
    def parse(data: bytes) -> "Shape":
        message = Message.parse(data)
        parts = tuple(Shape.parse(part) for part in message.all(4))
        code = message.number(2)
        dtype = TYPES.get(code, f"type {code}")
        dims = tuple(message.ints(3))
        dynamic = any(message.ints(6)) or any(d < 0 for d in dims)
        return Shape(dtype, dims, parts, dynamic or any(p.dynamic for p in parts))

    def encode(self) -> bytes:
        """With the usual layout: the last dimension is the fastest."""
        message = Message()
        message.put(2, CODES[self.dtype])
        message.put_ints(3, self.dims)
        for part in self.parts:
            message.add(4, part.encode())
        if not self.parts and self.dtype != "tuple":
            layout = Message()
            layout.put_ints(1, range(len(self.dims) - 1, -1, -1))
            message.add(5, layout.encode())
            message.put_ints(6, [0] * len(self.dims))
        return message.encode()

    @property
    def size(self) -> int:
        """Elements of an array."""
        total = 1
        for dim in self.dims:
            total *= dim
        return total

    def __str__(self) -> str:
        if self.parts:
            return f"({', '.join(map(str, self.parts))})"
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


@dataclass
class Instruction:
    """One operation; ids are unique in the module."""

    id: int
    name: str
    opcode: str
    shape: bytes  # ShapeProto
    operands: list[int] = field(default_factory=list)  # ids
    called: list[int] = field(default_factory=list)  # ids of computations
    control: list[int] = field(default_factory=list)  # ids
    parameter: int = 0
    tuple_index: int = 0
    metadata: bytes = b""
    rest: Message = field(default_factory=Message)

    @staticmethod
    def parse(data: bytes) -> "Instruction":
        m = Message.parse(data)
        rest = Message([f for f in m.fields if f[0] not in KNOWN])
        return Instruction(
            id=m.number(ID),
            name=m.text(NAME),
            opcode=m.text(OPCODE),
            shape=m.blob(SHAPE),
            operands=m.ints(OPERANDS),
            called=m.ints(CALLED),
            control=m.ints(CONTROL),
            parameter=m.number(PARAMETER),
            tuple_index=m.number(TUPLE_INDEX),
            metadata=m.blob(METADATA),
            rest=rest,
        )

    def encode(self) -> bytes:
        m = Message()
        m.put(NAME, self.name)
        m.put(OPCODE, self.opcode)
        m.put(SHAPE, self.shape)
        if self.metadata:
            m.put(METADATA, self.metadata)
        m.put(PARAMETER, self.parameter)
        m.put(TUPLE_INDEX, self.tuple_index)
        m.put(ID, self.id)
        m.put_ints(OPERANDS, self.operands)
        m.put_ints(CONTROL, self.control)
        m.put_ints(CALLED, self.called)
        m.fields += self.rest.fields
        return m.encode()

    def parsed_shape(self) -> Shape:
        return Shape.parse(self.shape)

    def copy(self) -> "Instruction":
        """A copy whose lists may be changed."""
        return Instruction(
            self.id,
            self.name,
            self.opcode,
            self.shape,
            list(self.operands),
            list(self.called),
            list(self.control),
            self.parameter,
            self.tuple_index,
            self.metadata,
            Message(list(self.rest.fields)),
        )


@dataclass
class Computation:
    """A list of instructions in an order in which operands come first."""

    id: int
    name: str
    root: int
    instructions: list[Instruction]

    @staticmethod
    def parse(data: bytes) -> "Computation":
        m = Message.parse(data)
        instructions = [Instruction.parse(i) for i in m.all(2)]
        return Computation(m.number(5), m.text(1), m.number(6), instructions)

    @property
    def parameters(self) -> list[Instruction]:
        """In their order."""
        found = [i for i in self.instructions if i.opcode == "parameter"]
        return sorted(found, key=lambda i: i.parameter)

    def instruction(self, id: int) -> Instruction:
        """By id."""
        return next(i for i in self.instructions if i.id == id)

    def program_shape(self) -> Message:
        """The ProgramShapeProto that follows from parameters and root."""
        shape = Message()
        for parameter in self.parameters:
            shape.add(1, parameter.shape)
        shape.put(2, self.instruction(self.root).shape)
        for parameter in self.parameters:
            shape.add(3, parameter.name)
        return shape

    def encode(self) -> bytes:
        m = Message()
        m.put(1, self.name)
        for instruction in self.instructions:
            m.add(2, instruction.encode())
        m.put(4, self.program_shape())
        m.put(5, self.id)
        m.put(6, self.root)
        return m.encode()


@dataclass
class Module:
    """A whole program."""

    name: str
    entry: int  # id of a computation
    computations: list[Computation]
    aliases: list[tuple[int, int]]  # (output, parameter), both of one level
    frames: bytes = b""  # StackFrameIndexProto: where each instruction comes from

    @staticmethod
    def parse(data: bytes) -> "Module":
        m = Message.parse(data)
        aliases = []
        for entry in m.message(8).all(1):
            e = Message.parse(entry)
            output = e.ints(1)
            aliases.append((output[0] if output else 0, e.number(2)))
        return Module(
            name=m.text(1),
            entry=m.number(6),
            computations=[Computation.parse(c) for c in m.all(3)],
            aliases=aliases,
            frames=m.blob(17),
        )

    @property
    def main(self) -> Computation:
        return self.computation(self.entry)

    def computation(self, id: int) -> Computation:
        return next(c for c in self.computations if c.id == id)

    def encode(self) -> bytes:
        """HloModuleProto."""
        m = Message()
        m.put(1, self.name)
        m.put(2, self.main.name)
        for computation in self.computations:
            m.add(3, computation.encode())
        m.put(4, self.main.program_shape())
        m.put(6, self.entry)
        alias = Message()
        for output, parameter in self.aliases:
            entry = Message()
            entry.put_ints(1, [output])
            entry.put(2, parameter)
            entry.put(4, 1)  # may alias
            alias.add(1, entry)
        if self.aliases:
            m.put(8, alias)
        if self.frames:
            m.put(17, self.frames)
        return m.encode()

    def sources(self) -> "Sources":
        return Sources(self.frames)


class Sources:
    """Where instructions come from: "octavo/engine/step.py:120"."""

    def __init__(self, frames: bytes) -> None:
        index = Message.parse(frames)
        self._files = [f.decode() for f in index.all(1)]
        self._locations = [Message.parse(f) for f in index.all(3)]
        self._frames = [Message.parse(f) for f in index.all(4)]

    def of(self, instruction: Instruction) -> str:
        """File and line, or what jax called the operation, or nothing."""
        metadata = Message.parse(instruction.metadata)
        file, line = metadata.text(3), metadata.number(4)
        frame = metadata.number(15)
        if 0 < frame <= len(self._frames):
            at = self._frames[frame - 1].number(1)
            location = self._locations[at - 1]
            file, line = self._files[location.number(1) - 1], location.number(3)
        if file:
            return f"{_short(file)}:{line}"
        return metadata.text(2)


def _short(file: str) -> str:
    """The end of a path, from the package on where it is one of ours."""
    parts = file.split("/")
    ours = ("engine", "models", "backends", "pallas_kernels")
    for i in range(len(parts) - 1, -1, -1):
        if parts[i] in ours:
            return "/".join(["octavo", *parts[i:]])
    return "/".join(parts[-2:])
