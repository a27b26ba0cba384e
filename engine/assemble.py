"""From an EngineConfig to the parts of an engine: backend, sizes, weights."""

import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from octavo.backends.record import Backend
from octavo.backends.select import select
from octavo.engine.config import ConfigError, EngineConfig
from octavo.engine.grammar.vocabulary import Vocabulary
from octavo.engine.host import Limits
from octavo.engine.memory import Resolved, resolve
from octavo.engine.text.opened import open_text
from octavo.models.checkpoint import Checkpoint, CheckpointError, open_checkpoint
from octavo.models.config import ModelConfig, ModelConfigError
from octavo.models.load import LoadError, Put, load_params, random_params
from octavo.models.registry import Model

Progress = Callable[[str, int, int], None]  # what, done, total


@dataclass
class Parts:
    """What an engine is made of."""

    backend: Backend
    resolved: Resolved
    params: Any
    eos_token_ids: list[int]
    load_seconds: float
    vocabulary: Callable[[], Vocabulary] | None = None  # None: no request may ask for a form


@contextmanager
def refusals() -> Iterator[None]:
    """What is wrong with a checkpoint is the user's to mend, as a wrong setting is."""
    try:
        yield
    except (CheckpointError, LoadError, ModelConfigError) as error:
        raise ConfigError(str(error)) from None


def open_model(config: EngineConfig) -> Checkpoint:
    """The checkpoint that a config names."""
    return open_checkpoint(
        config.model,
        revision=config.revision,
        offline=config.offline,
        load_format=config.load_format,
    )


def assemble(
    config: EngineConfig,
    progress: Progress | None = None,
    decided: Callable[[Backend, Resolved], None] | None = None,
) -> Parts:
    """Open the checkpoint, decide every size, load the weights.

    `decided` is called between the last two: from there on everything can be compiled.
    """
    backend = select(config.device)
    with refusals(), closing(open_model(config)) as checkpoint:
        resolved = resolve(config, backend, ModelConfig.from_hf(checkpoint.config))
        if decided is not None:
            decided(backend, resolved)
        began = time.perf_counter()
        model, dtype = resolved.model, resolved.dtype
        params = load_weights(config, checkpoint, model, dtype, progress, backend.put)
        eos = end_tokens(checkpoint.config, checkpoint.generation_config)
    vocabulary = partial(read_vocabulary, config, resolved.dims.vocab, eos)
    return Parts(backend, resolved, params, eos, time.perf_counter() - began, vocabulary)


def read_vocabulary(config: EngineConfig, size: int, ends: list[int]) -> Vocabulary:
    """The tokens of the config's model, for grammars. Raises ParameterError."""
    return Vocabulary.of(open_text(config).tokenizer, size, ends)


def load_weights(
    config: EngineConfig,
    checkpoint: Checkpoint,
    model: Model,
    dtype: Any,
    progress: Progress | None = None,
    put: Put = jax.device_put,
) -> Any:
    """Every parameter of `model`, in its place."""
    if config.load_format == "dummy":
        return random_params(model, config.seed, dtype, put)
    if checkpoint.format == "orbax":
        from octavo.models.sources.orbax import load

        params = load(checkpoint.path, model.abstract_params(dtype))
        elsewhere = put is not jax.device_put
        return jax.tree.map(lambda leaf: put(np.asarray(leaf)), params) if elsewhere else params
    report = None
    if progress is not None:

        def report(name: str, done: int, total: int) -> None:
            progress("weights", done, total)

    return load_params(
        model,
        checkpoint.get,
        checkpoint.names(),
        dtype,
        put=put,
        progress=report,
    )


def limits_of(config: EngineConfig, resolved: Resolved) -> Limits:
    """What the engine's schedules must respect."""
    return Limits(
        dims=resolved.dims,
        row_buckets=resolved.row_buckets,
        token_buckets=resolved.token_buckets,
        depth=config.steps_in_flight,
        prefix_caching=config.enable_prefix_caching,
        by_priority=config.scheduling_policy == "priority",
        steps=resolved.steps,
        several_rows=resolved.several_rows,
        apart=not resolved.mixed,
        chunks=resolved.chunks,
        context_buckets=resolved.context_buckets,
    )


def end_tokens(config: dict[str, Any], generation: dict[str, Any]) -> list[int]:
    """The model's end-of-sequence tokens: generation_config.json's set, then config.json's."""
    for source in (generation, config):
        ids = source.get("eos_token_id")
        if ids is not None:
            return [int(i) for i in (ids if isinstance(ids, list) else [ids])]
    return []


def cache_maker(backend: Backend, resolved: Resolved) -> Callable[[], Any]:
    """A function that makes the empty key-value cache; traceable."""
    _, heads, head = resolved.model.attention
    pages = [group.pages for group in resolved.dims.groups]

    def make() -> Any:
        return backend.init_cache(
            resolved.model.layer_specs,
            pages,
            resolved.dims.page_size,
            heads,
            head,
            jnp.dtype(resolved.kv_dtype),
        )

    return make
