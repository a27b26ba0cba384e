"""The sizes and weights of a reading engine: what is decided before anything is allocated."""

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp

from octavo.backends.record import Backend
from octavo.backends.select import select
from octavo.engine.assemble import load_weights, open_model, refusals
from octavo.engine.config import ConfigError, EngineConfig, devices_of
from octavo.engine.encode import EncodePrograms, Reading
from octavo.engine.memory import size
from octavo.engine.mesh import Placement
from octavo.engine.packing import Shape, shapes
from octavo.models.checkpoint import Checkpoint
from octavo.models.config import ModelConfig
from octavo.models.load import param_bytes
from octavo.models.registry import Model, build
from octavo.models.sources.sentence import Pooling, pooling_of

Progress = Callable[[str, int, int], None]  # what, done, total
MOST_TOKENS = 1 << 13  # the longest text that `auto` takes: its attention grows with the square


@dataclass(frozen=True)
class EncoderMemory:
    """Bytes by purpose on one device, and what they buy."""

    device: str
    limit: int  # what the device has for us
    usable: int  # the share the user allows
    weights: int
    workspace: int  # the largest program's temporary memory
    max_model_len: int
    batch_tokens: int  # the most tokens that run together

    @property
    def total(self) -> int:
        """All that the engine takes."""
        return self.weights + self.workspace

    def lines(self) -> list[str]:
        """A table for people."""
        return [
            f"device     {size(self.limit):>10}   {self.device}, {size(self.usable)} of it usable",
            f"weights    {size(self.weights):>10}",
            f"workspace  {size(self.workspace):>10}",
            f"total      {size(self.total):>10}",
            f"reads texts of up to {self.max_model_len:,} tokens, {self.batch_tokens:,} together",
        ]


@dataclass(frozen=True)
class EncoderSizes:
    """All that was derived from the user's settings; logged, never asked for."""

    model: Model
    dtype: Any
    max_model_len: int
    shapes: tuple[Shape, ...]
    memory: EncoderMemory


@dataclass
class Encoder:
    """What a reading engine is made of."""

    reading: Reading
    sizes: EncoderSizes
    pooling: Pooling
    params: Any
    load_seconds: float


def assemble_encoder(config: EngineConfig, progress: Progress | None = None) -> Encoder:
    """Open the checkpoint, decide every size, load the weights. Raises ConfigError."""
    backend = select(config.device)
    with refusals(), closing(open_model(config)) as checkpoint:
        pooling, sizes = resolve_encoder(config, backend, checkpoint)
        began = time.perf_counter()
        params = load_weights(
            config, checkpoint, Placement(None, sizes.model), sizes.dtype, progress
        )
    reading = Reading(sizes.model, backend, pooling.mode)
    return Encoder(reading, sizes, pooling, params, time.perf_counter() - began)


def plan_encoder(config: EngineConfig) -> EncoderMemory:
    """The plan, with the workspace that the compiled programs really need. Raises ConfigError."""
    backend = select(config.device)
    with refusals(), closing(open_model(config)) as checkpoint:
        pooling, sizes = resolve_encoder(config, backend, checkpoint)
    programs = EncodePrograms(Reading(sizes.model, backend, pooling.mode))
    largest = (max(sizes.shapes, key=lambda s: s.tokens), sizes.shapes[-1])
    programs.compile(sizes.model.abstract_params(sizes.dtype), tuple(dict.fromkeys(largest)))
    return check_encoder(sizes, programs.workspace())


def resolve_encoder(
    config: EngineConfig, backend: Backend, checkpoint: Checkpoint
) -> tuple[Pooling, EncoderSizes]:
    """Decide how texts are pooled, and every size. Raises ConfigError where it does not fit."""
    if devices_of(config.mesh) > 1:
        raise ConfigError(
            f"a model that only reads runs on one device, got `mesh={config.mesh}`",
            "leave `mesh` empty",
        )
    if why := backend.why_not(config):
        raise ConfigError(why)
    # Nobody asks a reading model what comes next, so a head that is not its embedding is left out.
    facts = replace(ModelConfig.from_hf(checkpoint.config), tied=True)
    pooling = pooling_of(checkpoint, encoder=facts.family == "bert")
    dtype = jnp.dtype(backend.dtype if config.dtype == "auto" else config.dtype)
    longest = _longest(config, facts, pooling)
    budget = config.max_num_batched_tokens or backend.max_num_batched_tokens
    model, limit = build(facts, longest), backend.memory_limit()
    known = shapes(budget, longest)
    memory = EncoderMemory(
        device=backend.name,
        limit=limit,
        usable=int(limit * config.memory_utilization),
        weights=param_bytes(model, dtype),
        workspace=0,
        max_model_len=longest,
        batch_tokens=max(shape.tokens for shape in known),
    )
    if memory.weights > memory.usable:
        raise ConfigError(
            f"the model does not fit: {size(memory.weights)} of weights, and {size(memory.usable)} "
            f"usable ({size(limit)} on {backend.name})",
            "a smaller model, --dtype bfloat16, or a larger device",
        )
    return pooling, EncoderSizes(model, dtype, longest, known, memory)


def _longest(config: EngineConfig, facts: ModelConfig, pooling: Pooling) -> int:
    """The longest text."""
    if config.max_model_len == "auto":
        return min(facts.max_len, pooling.max_len or facts.max_len, MOST_TOKENS)
    asked = int(config.max_model_len)
    if asked > facts.max_len:
        raise ConfigError(
            f"`max_model_len` is {asked:,}, but the model was trained for {facts.max_len:,}; "
            f"use --max-model-len {facts.max_len}"
        )
    return asked


def check_encoder(sizes: EncoderSizes, workspace: int) -> EncoderMemory:
    """The plan with the measured workspace. Raises ConfigError where that does not fit."""
    plan = replace(sizes.memory, workspace=workspace)
    if plan.total > plan.usable:
        raise ConfigError(
            f"the compiled programs need {size(workspace)} of workspace, and with "
            f"{size(plan.weights)} of weights that is {size(plan.total - plan.usable)} more than "
            f"the {size(plan.usable)} usable",
            "a smaller --max-num-batched-tokens or --max-model-len",
        )
    return plan
