"""From the HLO that jax lowers to the HLO that neuronx-cc may be given.

flatten    every `call` is replaced by what it calls; the shells that shard_map leaves go, so
           that parameters and results have the shapes of one rank
legalize   what has no operator there is written with operators that are; bool tensors at the
           border become u8
narrow     a leaf of the state that only passes through is no input and no output; nor is an
           input that nobody reads
tidy       only what the result needs, ids dense from 1, legacy replica groups, usual layouts,
           the names by which the runtime binds inputs and outputs
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from octavo.backends.neuron import hlo
from octavo.backends.neuron.exported import TensorInfo
from octavo.backends.neuron.hlo import Computation, Instruction, Module, Shape
from octavo.backends.neuron.wire import Message

# Custom calls that only tell a partitioner about shapes.
SHELLS = (
    "Sharding",
    "SPMDFullToShardShape",
    "SPMDShardToFullShape",
    "xla.sdy.GlobalToLocalShape",
    "xla.sdy.LocalToGlobalShape",
    "xla.sdy.FuncResultSharding",
)


@dataclass(frozen=True)
class Safe:
    """A module that is ready for the linter and the compiler."""

    module: Module
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]


def make_safe(data: bytes, name: str, inputs: Sequence[str], outputs: Sequence[str]) -> Safe:
    """data: a serialized HloModuleProto as jax lowers it; inputs and outputs: the leaf of each
    parameter and of each element of the result."""
    module = Module.parse(data)
    module.name = name
    leaves_in, leaves_out = list(inputs), list(outputs)
    _flatten(module)
    _legalize(module)
    _narrow(module, leaves_in, leaves_out)
    _tidy(module)
    main = module.main
    root = main.instruction(main.root)
    _name_tensors(main, root)
    parts = root.parsed_shape().parts
    return Safe(
        module,
        tuple(
            _info(f"input{i}", p.parsed_shape(), leaf)
            for i, (p, leaf) in enumerate(zip(main.parameters, leaves_in, strict=True))
        ),
        tuple(
            _info(f"output{i}", part, leaf)
            for i, (part, leaf) in enumerate(zip(parts, leaves_out, strict=True))
        ),
    )


def canonical(data: bytes) -> bytes:
    """A module without names and source lines: equal for two that compute the same the same way."""
    module = Module.parse(data)
    module.name, module.frames = "graph", b""
    for computation in module.computations:
        for instruction in computation.instructions:
            instruction.metadata = b""
    return module.encode()


def _info(name: str, shape: Shape, leaf: str) -> TensorInfo:
    return TensorInfo(name=name, shape=shape.dims, dtype=shape.dtype, leaf=leaf)


class _Ids:
    """Fresh ids above all that are taken."""

    def __init__(self, module: Module) -> None:
        every = [i.id for c in module.computations for i in c.instructions]
        every += [c.id for c in module.computations]
        self._next = max(every) + 1

    def __call__(self) -> int:
        self._next += 1
        return self._next - 1


class _Inliner:
    """Copies one computation with everything that it calls into one list."""

    def __init__(self, module: Module, ids: _Ids) -> None:
        self.computations = {c.id: c for c in module.computations}
        self.ids = ids
        self.out: dict[int, Instruction] = {}  # by id, in order

    def run(self, computation: Computation, arguments: list[int] | None) -> int:
        """Append it; returns the id of its result."""
        new: dict[int, int] = {}
        for instruction in computation.instructions:
            operands = [new[o] for o in instruction.operands]
            if instruction.opcode == "parameter" and arguments is not None:
                new[instruction.id] = arguments[instruction.parameter]
            elif instruction.opcode == "call":
                callee = self.computations[instruction.called[0]]
                new[instruction.id] = self.run(callee, operands)
            elif instruction.opcode == "get-tuple-element":
                source = self.out[operands[0]]
                if source.opcode == "tuple":
                    new[instruction.id] = source.operands[instruction.tuple_index]
                else:
                    new[instruction.id] = self._append(instruction, operands)
            elif instruction.opcode == "opt-barrier":
                new[instruction.id] = operands[0]
            elif _is_shell(instruction):
                new[instruction.id] = self._unwrap(instruction, operands)
            else:
                new[instruction.id] = self._append(instruction, operands)
        return new[computation.root]

    def _append(self, instruction: Instruction, operands: list[int]) -> int:
        copy = instruction.copy()
        copy.id, copy.operands, copy.control = self.ids(), operands, []
        if copy.opcode == "tuple":  # its parts may have become local
            copy.shape = _tuple_shape([self.out[o] for o in operands])
        self.out[copy.id] = copy
        return copy.id

    def _unwrap(self, shell: Instruction, operands: list[int]) -> int:
        """A shell is its operands; on the way in they get the shapes of one rank."""
        shape = shell.parsed_shape()
        tupled = shape.dtype == "tuple"
        inward = shell.rest.text(hlo.TARGET) in (
            "SPMDFullToShardShape",
            "xla.sdy.GlobalToLocalShape",
        )
        if inward:
            parts = shape.parts if tupled else (shape,)
            for operand, part in zip(operands, parts, strict=True):
                if self.out[operand].opcode == "parameter":
                    self.out[operand].shape = part.encode()
        if not tupled:
            return operands[0]
        made = Instruction(self.ids(), "tuple", "tuple", b"", operands, metadata=shell.metadata)
        made.shape = _tuple_shape([self.out[o] for o in operands])
        self.out[made.id] = made
        return made.id


def _is_shell(instruction: Instruction) -> bool:
    target = instruction.rest.text(hlo.TARGET)
    return instruction.opcode == "custom-call" and target in SHELLS


def _tuple_shape(parts: list[Instruction]) -> bytes:
    return Shape("tuple", parts=tuple(p.parsed_shape() for p in parts)).encode()


def _flatten(module: Module) -> None:
    """No calls, no shells, and a result that is a tuple."""
    ids = _Ids(module)
    made = []
    for computation in module.computations:
        inliner = _Inliner(module, ids)
        root = inliner.run(computation, None)
        made.append(Computation(computation.id, computation.name, root, list(inliner.out.values())))
    module.computations = made
    main = module.main
    last = main.instruction(main.root)
    if last.opcode != "tuple":
        wrapped = Instruction(ids(), "result", "tuple", _tuple_shape([last]), [last.id])
        main.instructions.append(wrapped)
        main.root = wrapped.id


def _legalize(module: Module) -> None:
    """Operators that are not there, and types that no tensor at the border may have."""
    ids = _Ids(module)
    for computation in module.computations:
        instructions: list[Instruction] = []
        for instruction in computation.instructions:
            if instruction.opcode == "logistic":
                instructions += _logistic(instruction, ids)
            else:
                instructions.append(instruction)
        computation.instructions = instructions
    _border(module.main, ids)


def _logistic(x: Instruction, ids: _Ids) -> list[Instruction]:
    """1 / (1 + exp(-x)); the last one has the id of x."""
    shape = x.parsed_shape()
    one = _like(x, ids(), "constant", Shape(shape.dtype).encode())
    one.rest.put(hlo.LITERAL, _one(shape.dtype))
    ones = _like(x, ids(), "broadcast", x.shape, one.id)
    minus = _like(x, ids(), "negate", x.shape, x.operands[0])
    power = _like(x, ids(), "exponential", x.shape, minus.id)
    total = _like(x, ids(), "add", x.shape, ones.id, power.id)
    return [one, ones, minus, power, total, _like(x, x.id, "divide", x.shape, ones.id, total.id)]


def _like(source: Instruction, id: int, opcode: str, shape: bytes, *operands: int) -> Instruction:
    """A new instruction that comes from the same line."""
    return Instruction(id, opcode, opcode, shape, list(operands), metadata=source.metadata)


def _one(dtype: str) -> Message:
    """LiteralProto of the scalar 1."""
    literal = Message()
    literal.put(1, Shape(dtype).encode())
    if dtype == "f32":
        literal.put(8, struct.pack("<f", 1.0))
    elif dtype == "bf16":
        literal.put(13, struct.pack("<f", 1.0)[2:])
    else:
        literal.put(11, struct.pack("<e", 1.0))
    return literal


def _border(main: Computation, ids: _Ids) -> None:
    """Bool parameters and results as u8; results that are parameters as copies of them."""
    instructions: list[Instruction] = []
    renamed: dict[int, int] = {}
    for instruction in main.instructions:
        shape = instruction.parsed_shape()
        if instruction.id != main.root:
            instruction.operands = [renamed.get(o, o) for o in instruction.operands]
        instructions.append(instruction)
        if instruction.opcode == "parameter" and shape.dtype == "pred":
            cast = _like(instruction, ids(), "convert", instruction.shape, instruction.id)
            instruction.shape = Shape("u8", shape.dims).encode()
            instructions.append(cast)
            renamed[instruction.id] = cast.id
    by_id = {i.id: i for i in instructions}
    root = by_id[main.root]
    instructions.remove(root)
    for at, operand in enumerate(root.operands):
        source = by_id[operand]
        shape = source.parsed_shape()
        if shape.dtype == "pred":
            cast = _like(source, ids(), "convert", Shape("u8", shape.dims).encode(), operand)
            instructions.append(cast)
            by_id[cast.id] = cast
            root.operands[at] = cast.id
    root.shape = _tuple_shape([by_id[o] for o in root.operands])
    main.instructions = [*instructions, root]


def _narrow(module: Module, inputs: list[str], outputs: list[str]) -> None:
    """Drop what only passes through and what nobody reads, from both lists of leaves too."""
    main = module.main
    by_id = {i.id: i for i in main.instructions}
    root = by_id[main.root]
    through = {
        at
        for at, operand in enumerate(root.operands)
        if by_id[operand].opcode == "parameter" and inputs[by_id[operand].parameter] == outputs[at]
    }
    kept_out = [at for at in range(len(outputs)) if at not in through]
    root.operands = [root.operands[at] for at in kept_out]
    for at, result in enumerate(root.operands):  # a result is never the very parameter
        if by_id[result].opcode == "parameter":
            copy = _like(by_id[result], _Ids(module)(), "copy", by_id[result].shape, result)
            main.instructions.insert(-1, copy)
            by_id[copy.id] = copy
            root.operands[at] = copy.id
    root.shape = _tuple_shape([by_id[o] for o in root.operands])
    main.instructions = _needed(main)
    read = {o for i in main.instructions for o in i.operands}
    parameters = main.parameters
    kept_in = [p.parameter for p in parameters if p.id in read]
    main.instructions = [
        i for i in main.instructions if i.opcode != "parameter" or i.parameter in kept_in
    ]
    for parameter in main.parameters:
        parameter.parameter = kept_in.index(parameter.parameter)
    module.aliases = [
        (kept_out.index(output), kept_in.index(parameter))
        for output, parameter in module.aliases
        if output in kept_out and parameter in kept_in
    ]
    inputs[:] = [inputs[at] for at in kept_in]
    outputs[:] = [outputs[at] for at in kept_out]


def _needed(computation: Computation) -> list[Instruction]:
    """The instructions that the root needs, and the parameters."""
    by_id = {i.id: i for i in computation.instructions}
    needed, stack = set(), [computation.root]
    while stack:
        id = stack.pop()
        if id not in needed:
            needed.add(id)
            stack += by_id[id].operands
    return [i for i in computation.instructions if i.id in needed or i.opcode == "parameter"]


def _tidy(module: Module) -> None:
    """Reachable computations only, dense ids, and no fields that name a partitioner's wishes."""
    for computation in module.computations:
        computation.instructions = _needed(computation)
    by_id = {c.id: c for c in module.computations}
    order: list[int] = []

    def visit(id: int) -> None:
        if id in order:
            return
        for instruction in by_id[id].instructions:
            for called in instruction.called:
                visit(called)
        order.append(id)

    visit(module.entry)
    module.computations = [by_id[id] for id in order]
    computation_ids = {id: at + 1 for at, id in enumerate(order)}
    count = 0
    for computation in module.computations:
        new = {i.id: count + at + 1 for at, i in enumerate(computation.instructions)}
        count += len(new)
        for instruction in computation.instructions:
            instruction.id = new[instruction.id]
            instruction.name = f"{instruction.opcode}.{instruction.id}"
            instruction.operands = [new[o] for o in instruction.operands]
            instruction.called = [computation_ids[c] for c in instruction.called]
            instruction.shape = _usual(instruction.shape)
            _plain_fields(instruction)
        computation.root = new[computation.root]
        computation.id = computation_ids[computation.id]
        computation.name = f"computation.{computation.id}"
    module.entry = computation_ids[module.entry]
    module.main.name = "main"


def _usual(shape: bytes) -> bytes:
    return Shape.parse(shape).encode()


def _plain_fields(instruction: Instruction) -> None:
    rest = instruction.rest
    groups = _groups(rest)
    rest.drop(hlo.SHARDING, hlo.FRONTEND, hlo.ORIGINAL, hlo.STATISTICS)
    rest.drop(hlo.CHANNEL, hlo.GLOBAL_IDS, hlo.DEVICE_LIST, hlo.GROUPS)
    for group in groups:
        message = Message()
        message.put_ints(1, group)
        rest.add(hlo.GROUPS, message)


def _groups(rest: Message) -> list[list[int]]:
    """The ranks of each group of a collective, wherever they are said."""
    said = rest.all(hlo.GROUPS)
    if not said and rest.has(hlo.DEVICE_LIST):
        listed = rest.message(hlo.DEVICE_LIST)
        said = listed.all(1)
        if listed.has(2):
            return _iota_groups(listed.message(2))
    return [Message.parse(group).ints(1) for group in said]


def _iota_groups(listed: Message) -> list[list[int]]:
    """Groups said as a transposed range of numbers."""
    count, size = listed.number(1), listed.number(2)
    dims, order = listed.ints(3), listed.ints(4)
    strides = [1] * len(dims)
    for at in range(len(dims) - 2, -1, -1):
        strides[at] = strides[at + 1] * dims[at + 1]
    flat = [0]
    for axis in order:
        flat = [base + i * strides[axis] for base in flat for i in range(dims[axis])]
    return [flat[g * size : (g + 1) * size] for g in range(count)]


def _name_tensors(main: Computation, root: Instruction) -> None:
    """The names by which the runtime binds inputs and outputs."""
    for parameter in main.parameters:
        _attribute(parameter, "neff_input_names", f"input{parameter.parameter}")
    names = ",".join(f"output{at}" for at in range(len(root.operands)))
    _attribute(root, "neff_output_names", names)


def _attribute(instruction: Instruction, key: str, value: str) -> None:
    pair, attributes = Message(), Message()
    pair.put(1, key)
    pair.put(2, value)
    attributes.add(1, pair)
    instruction.rest.put(hlo.FRONTEND, attributes)
