"""`prepare`: compile all that an engine needs and keep it on disk, without loading any weight."""

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from octavo.backends.select import select
from octavo.engine.assemble import cache_maker, limits_of, open_model, refusals
from octavo.engine.config import ConfigError, EngineConfig
from octavo.engine.device import use_cache
from octavo.engine.memory import resolve
from octavo.engine.programs import Programs
from octavo.engine.step import Machine
from octavo.models.checkpoint import Checkpoint, CheckpointError
from octavo.models.config import ModelConfig


@dataclass(frozen=True)
class Prepared:
    """What was done."""

    reason: str  # the backend, and why
    folder: Path
    found: int  # programs that were there already
    compiled: int
    seconds: float


def _open(config: EngineConfig) -> Checkpoint:
    """The checkpoint, of which only the config is read: without weights where that is enough."""
    if config.load_format == "auto":
        try:
            return open_model(replace(config, load_format="dummy"))
        except CheckpointError:  # a folder with nothing but a .gguf file
            pass
    return open_model(config)


def prepare(
    config: EngineConfig, progress: Callable[[str, int, int], None] | None = None
) -> Prepared:
    """Compile what is not kept yet. Raises ConfigError where the model cannot be served here."""
    config.validate()
    folder = use_cache(config.compilation_cache)
    if folder is None:
        raise ConfigError(
            "there is no folder to keep compiled programs in",
            "--compilation-cache takes one that can be written to",
        )
    backend = select(config.device)
    with refusals(), closing(_open(config)) as checkpoint:
        resolved = resolve(config, backend, ModelConfig.from_hf(checkpoint.config))
    machine = Machine(resolved.dims, resolved.model, backend)
    programs = Programs(machine, limits_of(config, resolved), config.max_logprobs, folder)
    began = time.perf_counter()
    programs.compile(
        resolved.model.abstract_params(resolved.dtype), cache_maker(backend, resolved), progress
    )
    seconds = time.perf_counter() - began
    found = programs.found
    return Prepared(backend.reason, folder, found, len(programs.builds) - found, seconds)
