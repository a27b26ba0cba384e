"""`prepare`: compile all that an engine needs and keep it on disk, without loading any weight."""

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from octavo.backends.select import select
from octavo.engine.assemble import open_model, refusals
from octavo.engine.build import Build, cache_folder, use_cache
from octavo.engine.config import ConfigError, EngineConfig, devices_of
from octavo.engine.encode import EncodePrograms, Reading
from octavo.engine.encoder_plan import resolve_encoder
from octavo.engine.memory import resolve
from octavo.engine.runner import choose_runner
from octavo.models.checkpoint import CheckpointError
from octavo.models.config import ModelConfig


@dataclass(frozen=True)
class Prepared:
    """What was done."""

    reason: str  # the backend, and why
    folder: Path
    found: int  # programs that were there already
    compiled: int
    seconds: float


def readable(config: EngineConfig) -> EngineConfig:
    """The config, without weights where a config.json is enough: only that is read here."""
    if config.load_format == "auto":
        without = replace(config, load_format="dummy")
        try:
            open_model(without).close()
        except CheckpointError:  # a folder with nothing but a .gguf file
            return config
        return without
    return config


def prepare(
    config: EngineConfig, progress: Callable[[str, int, int], None] | None = None
) -> Prepared:
    """Compile what is not kept yet. Raises ConfigError where the model cannot be served here."""
    config.validate()
    folder = cache_folder(config.compilation_cache)
    if folder is None:
        raise ConfigError(
            "there is no folder to keep compiled programs in",
            "--compilation-cache takes one that can be written to",
        )
    with refusals():
        config = readable(config)
        if choose_runner(config) == "pooling":
            return _prepare_encoder(config, folder, progress)
        build = Build(config, progress)
        backend = select(config.device, devices_of(config.mesh))
        with closing(open_model(config)) as checkpoint:
            resolved = resolve(config, backend, ModelConfig.from_hf(checkpoint.config))
    build.begin(backend, resolved)
    programs = build.programs()
    found = programs.found
    return Prepared(backend.reason, folder, found, len(programs.builds) - found, build.seconds)


def _prepare_encoder(
    config: EngineConfig, folder: Path, progress: Callable[[str, int, int], None] | None
) -> Prepared:
    """The same for a model that reads; jax's own cache keeps its programs, and counts none."""
    use_cache(config.compilation_cache)
    backend = select(config.device, devices_of(config.mesh))
    with closing(open_model(config)) as checkpoint:
        pooling, sizes = resolve_encoder(config, backend, checkpoint)
    began = time.perf_counter()
    programs = EncodePrograms(Reading(sizes.model, backend, pooling.mode))
    programs.compile(sizes.model.abstract_params(sizes.dtype), sizes.shapes, progress)
    seconds = time.perf_counter() - began
    return Prepared(backend.reason, folder, 0, len(sizes.shapes), seconds)
