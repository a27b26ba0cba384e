"""What was compiled for a TPU that is not here, and what it says about serving there."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from octavo.backends.chips import Chip
from octavo.engine.ahead.hlo import Module
from octavo.engine.memory import MemoryPlan, Resolved, size
from octavo.engine.stages import micro_batches

LARGE = 8 << 20  # bytes from which a copy is worth naming


@dataclass(frozen=True)
class Program:
    """One compiled program."""

    name: str
    arguments: int
    argument_bytes: int
    in_place_bytes: int
    temporary_bytes: int
    kernels: dict[str, int]
    copies: dict[str, int]  # in HBM, of LARGE bytes or more
    collectives_per_layer: dict[str, int]
    collectives: dict[str, int]  # in all, the loop over layers counted once
    cycles: int  # the compiler's estimates added up, our own kernels aside

    @classmethod
    def of(cls, name: str, compiled: Any, loops: int) -> Self:
        """Measure what jax compiled; `loops` turns of the loop over layers."""
        module, memory = Module.read(compiled.as_text()), compiled.memory_analysis()
        return cls(
            name=name,
            arguments=module.arguments,
            argument_bytes=memory.argument_size_in_bytes,
            in_place_bytes=memory.alias_size_in_bytes,
            temporary_bytes=memory.temp_size_in_bytes,
            kernels=module.kernels(),
            copies=module.copies(LARGE),
            collectives_per_layer=module.collectives(module.layer_loop()),
            collectives=module.collectives(module.entry),
            cycles=module.cycles(loops),
        )


@dataclass(frozen=True)
class Attention:
    """Our kernels at the model's heads, from their schedules (attention.py)."""

    decode: int  # cycles for `tokens` tokens of a row in one layer
    copies: int  # that these tokens' copies from HBM take
    prefill: int  # for a KV head's block of queries over one buffer of tokens
    spills: int  # stores of registers that did not suffice, in both
    tokens: int
    cores: int  # of a device, which share the rows

    def cycles(self, rows: int, length: int, windows: Sequence[int]) -> int:
        """Of a decode step; windows: a layer's, 0 sees all."""
        seen = sum(min(length, window or length) for window in windows)
        return rows * seen * self.decode // (self.tokens * self.cores)


@dataclass(frozen=True)
class Step:
    """A decode step of all rows at one length: what bounds it."""

    rows: int
    length: int
    bytes: int  # read from HBM: every weight in every turn, the keys and values of every row
    seconds: float  # that takes at the chip's bandwidth, with waiting for the other stages
    cycles: int  # static, of everything but our kernels; 0 where it is not known
    attention_cycles: int  # static, of attention

    @property
    def tokens_per_second(self) -> float:
        return self.rows / self.seconds


@dataclass(frozen=True)
class Report:
    """A plan, and with programs what was compiled by it."""

    chip: Chip
    topology: str
    resolved: Resolved
    programs: list[Program] = field(default_factory=list)
    folder: Path | None = None
    attention: Attention | None = None

    @property
    def memory(self) -> MemoryPlan:
        return self.resolved.memory

    def steps(self) -> list[Step]:
        """Decode steps of all slots, as long as all of them fit, and of one alone."""
        memory = self.memory
        each = min(memory.max_model_len, memory.tokens // memory.max_num_seqs)
        shapes = [(1, memory.max_model_len), (memory.max_num_seqs, each)]
        return [self._step(rows, length) for rows, length in dict.fromkeys(shapes)]

    def _step(self, rows: int, length: int) -> Step:
        memory, dims = self.memory, self.resolved.dims
        stages = self.resolved.model.shards.stage
        parts = micro_batches(stages, rows, 0)
        turns = parts + stages - 1  # each reads a stage's weights, and one part's cache
        weights, read = memory.weights - self._not_read(), 0
        for group, cost in zip(dims.groups, memory.page_bytes, strict=True):
            seen = min(length, group.window) if group.window else length
            read += rows * seen * cost // dims.page_size
        bucket = next(r for r in self.resolved.row_buckets if r >= rows)
        named = {program.name: program.cycles for program in self.programs}
        cycles = named.get(f"greedy step of {bucket} rows", 0) if stages == 1 else 0
        seconds = turns * (weights + read / parts) / self.chip.bandwidth
        windows = [spec.window for spec in self.resolved.model.layer_specs]
        attention = self.attention.cycles(rows, length, windows) if self.attention else 0
        return Step(rows, length, turns * weights + read, seconds, cycles, attention)

    def _not_read(self) -> int:
        """Bytes of weights that a step only looks rows up in: an embedding that is no head."""
        config = self.resolved.model.local
        return 0 if config.tied else config.V * config.E * self.resolved.dtype.itemsize

    def lines(self) -> list[str]:
        """For people."""
        chip = self.chip
        figures = f"{chip.bandwidth / 1e9:,.0f} GB/s, {chip.flops / 1e12:,.0f} TFLOP/s bfloat16"
        out = [f"target     {chip.name}:{self.topology}, {figures} a device", *self.memory.lines()]
        for step in self.steps():
            cycles = f", {step.cycles:,} static cycles beside our kernels" if step.cycles else ""
            cycles += f" and {step.attention_cycles:,} of attention" if self.attention else ""
            out.append(
                f"decode     {step.rows} x {step.length:,} tokens: {size(step.bytes)} to read, at "
                f"least {step.seconds * 1e3:.2f} ms, at most {step.tokens_per_second:,.0f} "
                f"tokens/s{cycles}"
            )
        if a := self.attention:
            out.append(
                f"attention  a row and layer: {a.decode:,} static cycles for {a.tokens:,} tokens, "
                f"{a.decode / a.copies:.2f} of what their copies take; a block of a prompt over a "
                f"buffer of tokens: {a.prefill:,}; {a.spills} registers spilled"
            )
        if self.programs:
            out += self._program_lines()
        return out

    def _program_lines(self) -> list[str]:
        names = ("program", "arguments", "HBM", "in place", "temporary", "cycles")
        rows: list[tuple[str, ...]] = [(*names, "copies", "sent in a layer")]
        for p in self.programs:
            copies = ", ".join(f"{n} of {what}" for what, n in p.copies.items()) or "none"
            sent = ", ".join(f"{n} {what}" for what, n in p.collectives_per_layer.items())
            held = (p.argument_bytes, p.in_place_bytes, p.temporary_bytes)
            numbers = (str(p.arguments), *(size(count) for count in held), f"{p.cycles:,}")
            rows.append((p.name, *numbers, copies, sent or "nothing"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        out = [""]
        for row in rows:
            words = (0, len(row) - 2, len(row) - 1)
            padded = (
                cell.ljust(width) if i in words else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            out.append("  ".join(padded).rstrip())
        out += ["", f"folder     {self.folder}"]
        pages = self.memory.pages[0]
        out.append(
            f"start with --compilation-cache {self.folder} --num-pages {pages} and the settings "
            "of this command"
        )
        return out

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {
            "target": f"{self.chip.name}:{self.topology}",
            "chip": asdict(self.chip),
            "memory": asdict(self.memory),
            "row_buckets": self.resolved.row_buckets,
            "token_buckets": self.resolved.token_buckets,
            "decode": [
                asdict(step) | {"tokens_per_second": step.tokens_per_second}
                for step in self.steps()
            ],
            "attention": asdict(self.attention) if self.attention else None,
            "programs": [asdict(program) for program in self.programs],
            "folder": str(self.folder) if self.folder else None,
        }
