"""Reads an optimized HLO module as text: what a program copies, sends, and about costs. No jax."""

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f64": 8, "s64": 8}
COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
)
KERNEL = 'custom_call_target="tpu_custom_call"'
UNKNOWN = 1 << 62  # the compiler's "infinitely many" is above it

_MADE = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.+?) ([a-z][\w\-]*)\(")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")


@dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    result: str  # its type, with the layout
    line: str

    def size(self) -> int:
        """Bytes of the largest array that it makes."""
        return max(
            (_bytes(*found.groups()[:2]) for found in _ARRAY.finditer(self.result)), default=0
        )

    @property
    def shape(self) -> str:
        """dtype[dimensions] of the first array that it makes."""
        found = _ARRAY.search(self.result)
        return f"{found[1]}[{found[2]}]" if found else ""

    @property
    def in_vmem(self) -> bool:
        """Whether it makes something in a core's own memory."""
        return "S(1)" in self.result

    @property
    def cycles(self) -> int:
        """The compiler's estimate, 0 where it gives none."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.line)
        count = int(found[1]) if found else 0
        return count if count < UNKNOWN else 0

    def calls(self) -> list[str]:
        """The computations that it runs, a fusion's aside: those are one instruction."""
        if self.opcode == "fusion":
            return []
        named = re.findall(r"(?:body|to_apply|calls|called_computation)=%?([\w.\-]+)", self.line)
        branches = re.search(r"branch_computations=\{([^}]*)\}", self.line)
        return named + re.findall(r"%([\w.\-]+)", branches[1] if branches else "")


def _bytes(kind: str, dimensions: str) -> int:
    size = 1 if kind.startswith("f8") else BYTES.get(kind, 4)
    return size * math.prod(int(d) for d in dimensions.split(",") if d)


@dataclass
class Module:
    """Computations by name."""

    computations: dict[str, list[Instruction]] = field(default_factory=dict)
    entry: str = ""

    @classmethod
    def read(cls, text: str) -> "Module":
        module, into = cls(), None
        for line in text.splitlines():
            if line.endswith("{") and not line.startswith((" ", "HloModule")):
                name = line.removeprefix("ENTRY ").split()[0].lstrip("%").split("(")[0]
                into = module.computations.setdefault(name, [])
                if line.startswith("ENTRY"):
                    module.entry = name
            elif into is not None and (made := _MADE.match(line)):
                into.append(Instruction(made[1], made[3], made[2], line))
        return module

    @property
    def arguments(self) -> int:
        """What the program is called with."""
        return sum(one.opcode == "parameter" for one in self.computations[self.entry])

    @cached_property
    def fused(self) -> set[str]:
        """The computations that are fusions: what happens inside of one takes no memory."""
        named = re.compile(r"calls=%?([\w.\-]+)")
        return {
            name
            for instructions in self.computations.values()
            for one in instructions
            if one.opcode == "fusion"
            for name in named.findall(one.line)
        }

    def running(self) -> Iterator[Instruction]:
        """Every instruction outside of fusions."""
        for name, instructions in self.computations.items():
            if name not in self.fused:
                yield from instructions

    def copies(self, least: int) -> dict[str, int]:
        """What is copied in HBM by instructions of its own, of at least so many bytes.

        A slice counts too: one that stands outside of a fusion is a copy of a part.
        """
        found: Counter[str] = Counter()
        for one in self.running():
            name = one.name.replace("_", "-")
            moves = one.opcode in ("copy", "copy-start", "dynamic-slice", "slice", "transpose")
            moves |= one.opcode == "fusion" and "slice-fusion" in name and "update" not in name
            moves |= "data-format" in name and one.opcode != "get-tuple-element"
            if moves and one.size() >= least and not one.in_vmem:
                found[one.shape] += 1
        return dict(found)

    def kernels(self) -> dict[str, int]:
        """Our own kernels by name, as often as they stand in the program."""
        found = Counter(
            re.sub(r"\.\d+$", "", one.name) for one in self.running() if KERNEL in one.line
        )
        return dict(found)

    def layer_loop(self) -> str:
        """The computation that is one turn of the loop over layers; "" where there is none."""
        for one in self.running():
            if one.opcode == "while":
                (body,) = re.findall(r"body=%?([\w.\-]+)", one.line)
                if any(KERNEL in inner.line for inner in self.computations[body]):
                    return str(body)
        return ""

    def collectives(self, of: str) -> dict[str, int]:
        """How often each stands in a computation and those it calls."""
        found: Counter[str] = Counter()
        for one in self.computations.get(of, []):
            opcode = one.opcode.removesuffix("-start")
            if opcode in COLLECTIVES:
                found[opcode] += 1
            for inner in one.calls():
                found.update(self.collectives(inner))
        return dict(found)

    def cycles(self, loops: int, of: str = "") -> int:
        """The compiler's estimates, added up; the loop over layers counts `loops` times.

        Kernels of our own have none, and loops whose length the data decides count once.
        """
        layers, total = self.layer_loop(), 0
        for one in self.computations.get(of or self.entry, []):
            total += one.cycles
            for inner in one.calls():
                total += self.cycles(loops, inner) * (loops if inner == layers else 1)
        return total
