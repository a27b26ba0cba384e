"""The rules that a graph must keep so that neuronx-cc takes it and a core runs it.

Each rule has a number, and each finding names the operation and the line of ours it comes from.
What the rules cannot know: whether the page table on the device holds what the engine put there;
that indices read from it are in bounds is the engine's own invariant, tested there.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from octavo.backends.neuron import hlo, ranges
from octavo.backends.neuron.errors import LintError
from octavo.backends.neuron.exported import Exported
from octavo.backends.neuron.hlo import Computation, Instruction, Module, Shape, Sources
from octavo.backends.neuron.wire import Message, unpack_floats

# Operators of AWS's list, and those that AWS's own front ends emit.
OPERATORS = frozenset(
    "abs add all-gather all-reduce all-to-all and atan2 bitcast-convert broadcast ceil clamp "
    "compare concatenate constant convert copy cosine divide dot exponential floor gather "
    "get-tuple-element iota log maximum minimum multiply negate not or pad parameter power reduce "
    "reduce-scatter remainder reshape reverse rsqrt scatter select shift-right-arithmetic "
    "shift-right-logical sign sine slice sqrt subtract tanh transpose tuple xor".split()
)
# Operators that have a rule of their own.
SPECIAL = frozenset(
    "while conditional custom-call call partition-id replica-id rng rng-bit-generator "
    "rng-get-and-update-state".split()
)
TYPES = frozenset("pred s32 u32 u8 f32 bf16 f16 f8e4m3 f8e5m2 tuple".split())
FLOATS = frozenset("f32 bf16 f16 f8e4m3 f8e5m2".split())
COLLECTIVES = frozenset("all-reduce all-gather reduce-scatter all-to-all".split())
REDUCERS = frozenset("add multiply minimum maximum".split())
CUSTOM_CALLS = frozenset(
    f"AwsNeuron{name}"
    for name in (
        "Erf Gelu GeluApprxTanh Silu RmsNorm Softmax CollectiveMatmul IntMatmult ArgMax ArgMin "
        "TopK TransferWithStaticRing CustomNativeKernel"
    ).split()
)
MOST_GROUPS = 16  # different communicators in one NEFF
MOST_INSTRUCTIONS = 5_000_000  # of the machine, in one NEFF
TILE_ROWS, TILE_COLUMNS = 128, 512  # what one instruction of the machine works on


@dataclass(frozen=True)
class Finding:
    """One break of one rule."""

    rule: str  # "N006"
    message: str  # what is wrong and what to write instead
    operation: str  # "reduce.17 f32[4]"
    where: str = ""  # "octavo/engine/step.py:120"
    severity: str = "error"  # or "warning": it may well work

    def __str__(self) -> str:
        place = f" from {self.where}" if self.where else ""
        return f"{self.rule}: {self.message} ({self.operation}{place})"


@dataclass
class Context:
    """What a rule looks at: one instruction and all around it."""

    exported: Exported
    target: Any  # targets.Target
    module: Module
    sources: Sources
    computation: Computation
    by_id: dict[int, Instruction]  # of the computation
    users: dict[int, list[Instruction]]  # by the id of what they use
    instruction: Instruction

    @property
    def operand_shapes(self) -> list[Shape]:
        return [self.by_id[o].parsed_shape() for o in self.instruction.operands]

    def found(self, rule: str, message: str, severity: str = "error") -> Finding:
        """A finding about this instruction."""
        return _finding(rule, message, self.instruction, self.sources, severity)


def _finding(rule: str, message: str, one: Instruction, sources: Sources, severity: str) -> Finding:
    operation = f"{one.name} {one.parsed_shape()}"
    return Finding(rule, message, operation, sources.of(one), severity)


def lint(exported: Exported, target: Any) -> list[Finding]:
    """All findings about a graph for a `targets.Target`; none with severity "error" is a pass."""
    module = Module.parse(exported.hlo)
    findings = list(_whole(exported, target, module))
    sources = module.sources()
    for computation in module.computations:
        by_id = {i.id: i for i in computation.instructions}
        users = defaultdict(list)
        for instruction in computation.instructions:
            for operand in instruction.operands:
                users[operand].append(instruction)
        around = (exported, target, module, sources, computation, by_id, users)
        for instruction in computation.instructions:
            context = Context(*around, instruction)
            for rule in RULES:
                findings += rule(context)
    return findings


def check(exported: Exported, target: Any) -> list[Finding]:
    """The findings that are warnings. Raises LintError."""
    findings = lint(exported, target)
    if found := errors(findings):
        raise LintError(exported.name, found)
    return findings


def operations(exported: Exported) -> int:
    """Operations of a graph, those inside reductions included."""
    return sum(len(c.instructions) for c in Module.parse(exported.hlo).computations)


def errors(findings: list[Finding]) -> list[Finding]:
    """Those that end an export."""
    return [f for f in findings if f.severity == "error"]


# --- rules about the whole graph


def _whole(exported: Exported, target: Any, module: Module) -> Iterator[Finding]:
    main, sources = module.main, module.sources()
    every = [(c, i) for c in module.computations for i in c.instructions]

    def found(rule: str, message: str, one: Instruction, severity: str = "error") -> Finding:
        return _finding(rule, message, one, sources, severity)

    ids = sorted(i.id for _, i in every)
    if ids != list(range(1, len(ids) + 1)):
        widest = max((i for _, i in every), key=lambda i: i.id)
        message = f"{len(ids)} operations have ids up to {ids[-1]}; number them from 1"
        yield found("N010", message, widest)
    if exported.nbytes > target.usable:
        largest = max(exported.inputs, key=lambda t: t.nbytes)
        yield found(
            "N014",
            f"inputs and outputs are {exported.nbytes:,} bytes a core, the largest {largest.leaf}, "
            f"and {target.name} has {target.usable:,}; use more cores, a shorter --max-model-len "
            "or fewer --num-pages",
            main.parameters[exported.inputs.index(largest)],
        )
    tiles = [_tiles(c, i) for c, i in every]
    if sum(tiles) > MOST_INSTRUCTIONS:
        yield found(
            "N017",
            f"about {sum(tiles):,} machine instructions, most of them in one operation, and a NEFF "
            f"holds {MOST_INSTRUCTIONS:,}; use smaller buckets or more cores",
            every[tiles.index(max(tiles))][1],
            "warning",
        )
    groups: set[tuple[tuple[int, ...], ...]] = set()
    for _, one in every:
        groups |= {tuple(map(tuple, _groups(one)))} - {()}
        if len(groups) > MOST_GROUPS:
            message = f"more than {MOST_GROUPS} different groups of ranks, this the first too many"
            yield found("N012", f"{message}; let collectives share groups", one)
            break
    made = [main.instruction(o) for o in main.instruction(main.root).operands]
    for rule, message, output, severity in _aliases(exported):
        yield found(rule, message, made[output], severity)


def _aliases(exported: Exported) -> Iterator[tuple[str, str, int, str]]:
    """(rule, message, output, severity) of what is not updated where it lies."""
    inputs, outputs = exported.inputs, exported.outputs
    aliased = {outputs[output].leaf for output, _ in exported.aliases}
    for at, tensor in enumerate(outputs):
        if tensor.leaf.startswith("state.") and tensor.leaf not in aliased:
            message = f"{tensor.leaf} is written to a new buffer; donate it, so that it stays"
            severity = "error" if tensor.leaf.startswith("state.kv") else "warning"
            yield "N020", f"{message} in place", at, severity
    for output, parameter in exported.aliases:
        here, there = outputs[output].leaf, inputs[parameter].leaf
        if here != there:
            message = f"{here} shares the buffer of {there}; only one leaf may be in a buffer"
            yield "N020", message, output, "error"


def _tiles(computation: Computation, instruction: Instruction) -> int:
    """Machine instructions, roughly: one a tile."""
    shape = instruction.parsed_shape()
    if instruction.opcode in ("parameter", "constant", "tuple", "reshape", "get-tuple-element"):
        return 0
    tiles = math.ceil(shape.size / (TILE_ROWS * TILE_COLUMNS))
    if instruction.opcode != "dot":
        return tiles
    by_id = {i.id: i for i in computation.instructions}
    contracted = instruction.rest.message(hlo.DOT).ints(1)
    left = by_id[instruction.operands[0]].parsed_shape().dims
    return tiles * math.ceil(math.prod(left[d] for d in contracted) / TILE_ROWS)


def _groups(instruction: Instruction) -> list[list[int]]:
    return [Message.parse(g).ints(1) for g in instruction.rest.all(hlo.GROUPS)]


# --- rules about one operation


def _static_shapes(c: Context) -> Iterator[Finding]:
    if c.instruction.parsed_shape().dynamic:
        yield c.found("N001", "a dimension is known only when it runs; use buckets")


def _operators(c: Context) -> Iterator[Finding]:
    opcode = c.instruction.opcode
    if opcode not in OPERATORS | SPECIAL:
        yield c.found("N002", f"{opcode} is no operator of the compiler; write it with others")
    if opcode == "shift-right-arithmetic" and c.instruction.parsed_shape().dtype != "s32":
        yield c.found("N002", "only numbers of 32 bits can be shifted with their sign")


def _types(c: Context) -> Iterator[Finding]:
    shape = c.instruction.parsed_shape()
    for part in shape.parts or (shape,):
        if part.dtype not in TYPES:
            yield c.found("N003", f"{part.dtype} is no type of {c.target.name}; use 32 bits")
        border = c.computation.id == c.module.entry and c.instruction.opcode in (
            "parameter",
            "tuple",
        )
        if border and part.dtype == "pred":
            yield c.found("N003", "a bool tensor crosses the border of the graph; pass it as u8")


def _gathers(c: Context) -> Iterator[Finding]:
    if c.instruction.opcode != "gather":
        return
    form = c.instruction.rest.message(hlo.GATHER)
    operand, index = c.operand_shapes
    if form.ints(5) or form.ints(6):
        yield c.found("N004", "a gather with batch dimensions; lay it flat: x.at[i].get() of rows")
    elif form.ints(2) != [0] or form.ints(3) != [0] or not _flat(index, form.number(4)):
        yield c.found("N004", "a gather of more than rows; index one dimension with one list")
    else:
        yield from _bounds(c, operand, index_of=1)


def _scatters(c: Context) -> Iterator[Finding]:
    if c.instruction.opcode != "scatter":
        return
    form = c.instruction.rest.message(hlo.SCATTER)
    if len(c.instruction.operands) != 3:
        yield c.found("N005", "a scatter into several arrays at once; make one of each")
        return
    operand, index, _ = c.operand_shapes
    if form.ints(5) or form.ints(6):
        yield c.found("N005", "a scatter with batch dimensions; lay it flat: x.at[i].set() of rows")
    elif form.ints(2) != [0] or form.ints(3) != [0] or not _flat(index, form.number(4)):
        yield c.found("N005", "a scatter of more than rows; index one dimension with one list")
    else:
        yield from _bounds(c, operand, index_of=1)
    how = c.module.computation(c.instruction.called[0])
    root = how.instruction(how.root)
    copies = root.opcode == "parameter" and root.parameter == 1
    if not copies and (root.opcode != "add" or operand.dtype not in FLOATS):
        yield c.found(
            "N005",
            f"a scatter that does {root.opcode} on {operand.dtype}; it may set, or add floats",
        )


def _flat(index: Shape, vector: int) -> bool:
    """Whether the indices are one list: [n], or [n, 1] with the index in the last dimension."""
    return vector == len(index.dims) or (vector == len(index.dims) - 1 and index.dims[-1] == 1)


def _bounds(c: Context, operand: Shape, index_of: int) -> Iterator[Finding]:
    low, high = ranges.of(c.by_id, c.instruction.operands[index_of])
    last = operand.dims[0] - 1
    if (low > -math.inf and low < 0) or (high < math.inf and high > last):
        yield c.found(
            "N019", f"indices from {low} to {high} into {last + 1} rows; out of bounds is an error"
        )


def _reduces(c: Context) -> Iterator[Finding]:
    if c.instruction.opcode != "reduce":
        return
    if len(c.instruction.operands) != 2:
        yield c.found("N006", "a reduce of several arrays at once; use max, then min of where")
        return
    how = c.module.computation(c.instruction.called[0])
    operator = how.instruction(how.root).opcode
    if operator in ("and", "or"):
        yield c.found(
            "N006", f"a reduce with {operator} is in no list of AWS's; use max of int32", "warning"
        )
    elif operator not in REDUCERS:
        yield c.found("N006", f"a reduce with {operator}; use add, multiply, min or max")


def _loops(c: Context) -> Iterator[Finding]:
    if c.instruction.opcode != "while":
        return
    ends = (c.module.computation(called) for called in c.instruction.called)
    if not any(_counts(one) for one in ends):
        yield c.found(
            "N007", "a loop whose end the device decides; unroll it, or count to a constant"
        )


def _counts(condition: Computation) -> bool:
    """Whether a loop's condition is: a counter is less than a constant."""
    by_id = {i.id: i for i in condition.instructions}
    root = by_id[condition.root]
    if root.opcode != "compare" or root.rest.text(hlo.COMPARISON) != "LT":
        return False
    counter, end = (by_id[o] for o in root.operands)
    return counter.opcode == "get-tuple-element" and end.opcode == "constant"


def _calls(c: Context) -> Iterator[Finding]:
    opcode = c.instruction.opcode
    if opcode == "conditional":
        yield c.found("N008", "a conditional; compute both and select")
    if opcode == "custom-call":
        name = c.instruction.rest.text(hlo.TARGET)
        if name not in CUSTOM_CALLS:
            yield c.found("N009", f"the compiler knows no custom call {name}")
    if opcode == "call":
        yield c.found("N011", "a call; the exporter should have put its body here")
    if opcode in ("partition-id", "replica-id"):
        yield c.found("N013", "a rank that the module asks for; pass it as an input")
    if opcode.startswith("rng"):
        yield c.found("N016", "random numbers of the device; hash integers instead")


def _collectives(c: Context) -> Iterator[Finding]:
    if c.instruction.opcode not in COLLECTIVES:
        return
    groups = _groups(c.instruction)
    members = sorted(rank for group in groups for rank in group)
    if members != list(range(c.exported.ranks)):
        yield c.found(
            "N012", f"its groups {groups} do not hold each of {c.exported.ranks} ranks once"
        )
    left = [
        field
        for field in (hlo.CHANNEL, hlo.GLOBAL_IDS, hlo.DEVICE_LIST)
        if c.instruction.rest.has(field)
    ]
    if left:
        yield c.found("N012", f"its ranks are said twice (fields {left}); keep the replica groups")
    for shape in c.operand_shapes:
        if shape.dtype not in FLOATS:
            yield c.found("N012", f"a collective of {shape.dtype}; convert to float32 around it")


def _dots(c: Context) -> Iterator[Finding]:
    if c.instruction.opcode == "dot":
        for shape in c.operand_shapes[:2]:
            if shape.dtype not in FLOATS:
                yield c.found("N015", f"a matrix product of {shape.dtype}; convert to float first")


def _constants(c: Context) -> Iterator[Finding]:
    if c.instruction.opcode != "constant" or _only_begins(c):
        return
    literal = c.instruction.rest.message(hlo.LITERAL)
    numbers = unpack_floats(literal.blob(8))
    halves = literal.blob(13)
    wide = b"".join(b"\0\0" + halves[i : i + 2] for i in range(0, len(halves), 2))
    if not all(map(math.isfinite, numbers)) or not all(map(math.isfinite, unpack_floats(wide))):
        yield c.found("N018", "a constant that is not finite; mask with -1e30")


def _only_begins(c: Context) -> bool:
    """Whether the constant only begins reductions, where -inf is the maximum of nothing."""
    return all(
        user.opcode == "reduce" and user.operands.index(c.instruction.id) == 1
        for user in c.users.get(c.instruction.id, ())
    )


RULES: tuple[Callable[[Context], Iterator[Finding]], ...] = (
    _static_shapes,
    _operators,
    _types,
    _gathers,
    _scatters,
    _reduces,
    _loops,
    _calls,
    _collectives,
    _dots,
    _constants,
)
