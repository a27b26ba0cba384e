"""The values an index can take, as far as the graph itself says: an interval."""

import math

from octavo.backends.neuron import hlo
from octavo.backends.neuron.hlo import Instruction

Range = tuple[float, float]  # both ends belong to it
UNKNOWN: Range = (-math.inf, math.inf)
SAME = frozenset("broadcast reshape transpose slice copy convert reverse".split())
DEEPEST = 64  # operations that are followed back


def of(by_id: dict[int, Instruction], id: int, depth: int = 0) -> Range:
    """The range of one instruction's elements. by_id: all instructions of its computation."""
    one = by_id[id]
    if depth > DEEPEST:
        return UNKNOWN
    parts = [of(by_id, o, depth + 1) for o in one.operands] if one.opcode in KNOWN else []
    if one.opcode == "constant":
        literal = one.rest.message(hlo.LITERAL)
        values = literal.ints(4) or literal.ints(6)
        return (min(values), max(values)) if values else UNKNOWN
    if one.opcode == "iota":
        dims = one.parsed_shape().dims
        along = one.rest.ints(hlo.DIMENSIONS)
        return 0, dims[along[0] if along else 0] - 1
    if one.opcode in SAME:
        return parts[0]
    if one.opcode in ("select", "concatenate"):
        parts = parts[1:] if one.opcode == "select" else parts
        return min(p[0] for p in parts), max(p[1] for p in parts)
    return _arithmetic(one.opcode, parts)


def _arithmetic(opcode: str, parts: list[Range]) -> Range:
    if opcode == "clamp":
        low, x, high = parts
        return max(low[0], min(x[0], high[0])), min(high[1], max(x[1], low[1]))
    if opcode == "minimum":
        return min(parts[0][0], parts[1][0]), min(parts[0][1], parts[1][1])
    if opcode == "maximum":
        return max(parts[0][0], parts[1][0]), max(parts[0][1], parts[1][1])
    if any(math.isinf(end) for part in parts for end in part):
        return UNKNOWN
    if opcode == "add":
        return parts[0][0] + parts[1][0], parts[0][1] + parts[1][1]
    if opcode == "subtract":
        return parts[0][0] - parts[1][1], parts[0][1] - parts[1][0]
    if opcode == "multiply":
        ends = [a * b for a in parts[0] for b in parts[1]]
        return min(ends), max(ends)
    return UNKNOWN


KNOWN = SAME | {
    "select",
    "concatenate",
    "clamp",
    "minimum",
    "maximum",
    "add",
    "subtract",
    "multiply",
}
