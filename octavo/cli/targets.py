"""`--target`: plan and compile for hardware that is not here.

The chip before the colon says whose work that is. A module named in MODULES has

    plan(wanted: Wanted) -> Report        what fits; nothing is compiled
    compile(wanted: Wanted) -> Report     that, and compiled programs in `wanted.output`

and raises ConfigError for what cannot be: a topology, a model, a setting.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from octavo.engine.config import ConfigError, EngineConfig

MODULES = {
    **dict.fromkeys(("v5e", "v5p", "v6e", "tpu7x"), "octavo.engine.ahead.tpu"),
}
TARGET_HELP = "hardware that is not here: CHIP:TOPOLOGY, for instance v6e:1x1 or tpu7x:1x1x1"


class Report(Protocol):
    """What was found, for people and for programs."""

    def lines(self) -> list[str]: ...

    def as_json(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Wanted:
    """One call of the command line."""

    config: EngineConfig
    target: str  # as typed
    output: Path | None = None  # compile: where the programs and report.json go
    progress: Callable[[str, int, int], None] | None = None  # what, done, total
    export_only: bool = False  # stop before the vendor's compiler, where there is a step before it

    @property
    def chip(self) -> str:
        """What stands before the colon."""
        return self.target.partition(":")[0]

    @property
    def topology(self) -> str:
        """What stands after the colon; "" where there is none."""
        return self.target.partition(":")[2]


def module_for(target: str) -> Any:
    """The module that serves a target. Raises ConfigError for a chip that none does."""
    chip = target.partition(":")[0]
    if chip not in MODULES:
        raise ConfigError(
            f"`--target` names no chip that is known here: {chip or repr(target)}",
            f"one of {', '.join(MODULES)}, a colon and a topology: --target v6e:2x2",
        )
    return import_module(MODULES[chip])
