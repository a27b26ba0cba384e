"""What compiling for hardware that is not here begins with, whichever hardware it is."""

from contextlib import closing
from pathlib import Path
from typing import Protocol

from octavo.engine.assemble import Progress, open_model
from octavo.engine.config import ConfigError, EngineConfig
from octavo.engine.runner import choose_runner
from octavo.models.config import ModelConfig


class Wanted(Protocol):
    """What the command line asks for (octavo/cli/targets.py)."""

    @property
    def config(self) -> EngineConfig: ...
    @property
    def chip(self) -> str: ...
    @property
    def topology(self) -> str: ...
    @property
    def output(self) -> Path | None: ...
    @property
    def progress(self) -> Progress | None: ...
    @property
    def export_only(self) -> bool: ...


def facts_of(config: EngineConfig, instead: str) -> ModelConfig:
    """The model of valid settings. Raises ConfigError, with `instead` where it only reads."""
    config.validate()
    if choose_runner(config) == "pooling":
        raise ConfigError("`--target` compiles models that write, and this one reads", instead)
    with closing(open_model(config)) as checkpoint:
        return ModelConfig.from_hf(checkpoint.config)
