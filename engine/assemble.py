"""From an EngineConfig to the parts of an engine: backend, sizes, weights."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from octavo.backends.record import CACHE_DTYPES, Backend
from octavo.backends.select import select
from octavo.engine.config import ConfigError, EngineConfig, devices_of
from octavo.engine.grammar.vocabulary import Vocabulary
from octavo.engine.host import Limits
from octavo.engine.memory import Resolved, resolve
from octavo.engine.mesh import Placement
from octavo.engine.text.opened import open_text
from octavo.models.checkpoint import Checkpoint, CheckpointError, open_checkpoint
from octavo.models.config import ModelConfig, ModelConfigError
from octavo.models.load import LoadError, load_params, random_params, ranks

logger = logging.getLogger(__name__)
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
    agree: Callable[[Backend], Backend] | None = None,
) -> Parts:
    """Open the checkpoint, decide every size, load the weights.

    `decided` is called between the last two: from there on everything can be compiled. `agree`
    changes the backend to one that every host can go along with.
    """
    hosts = int(config.hosts)
    backend = select(config.device, devices_of(config.mesh) // hosts)
    if agree is not None:
        backend = agree(backend)
    with refusals(), closing(open_model(config)) as checkpoint:
        resolved = resolve(config, backend, ModelConfig.from_hf(checkpoint.config))
        if decided is not None:
            decided(backend, resolved)
        began = time.perf_counter()
        place = place_of(backend, resolved)
        params = load_weights(config, checkpoint, place, resolved.dtype, progress)
        eos = end_tokens(checkpoint.config, checkpoint.generation_config)
    vocabulary = partial(read_vocabulary, config, resolved.dims.vocab, eos)
    return Parts(backend, resolved, params, eos, time.perf_counter() - began, vocabulary)


def read_vocabulary(config: EngineConfig, size: int, ends: list[int]) -> Vocabulary:
    """The tokens of the config's model, for grammars. Raises ParameterError."""
    return Vocabulary.of(open_text(config).tokenizer, size, ends)


def load_weights(
    config: EngineConfig,
    checkpoint: Checkpoint,
    place: Placement,
    dtype: Any,
    progress: Progress | None = None,
) -> Any:
    """Every parameter of the model, in its place."""
    model = place.model
    if config.load_format == "dummy":
        return random_params(model, config.seed, dtype, put=place.put_weight)
    _check_scales(config, checkpoint)
    if checkpoint.format == "orbax":
        from octavo.models.sources.orbax import load

        if place.mesh is not None:
            return load_over(place, checkpoint.path, dtype)
        params = load(checkpoint.path, model.abstract_params(dtype))
        if place.put_here is jax.device_put:
            return params
        return jax.tree.map(lambda leaf: place.put_here(np.asarray(leaf)), params)
    if checkpoint.quantized:
        kept = jnp.dtype(dtype).name
        logger.info("weights  read from %s, kept as %s", checkpoint.quantized, kept)
    report = None
    if progress is not None:

        def report(name: str, done: int, total: int) -> None:
            progress("weights", done, total)

    return load_params(
        model,
        checkpoint.get,
        checkpoint.names(),
        dtype,
        put=place.put_weight,
        progress=report,
    )


def _check_scales(config: EngineConfig, checkpoint: Checkpoint) -> None:
    """An int8 cache is of no use without scales; one of 8-bit floats has a range of its own."""
    kind = config.kv_cache_dtype
    if checkpoint.format == "orbax" and kind in CACHE_DTYPES:
        raise ConfigError(
            f"`kv_cache_dtype={kind}`: a folder saved in its final layout keeps no scales of keys "
            "and values; load the original checkpoint"
        )
    if kind == "int8" and not any(name.endswith(".k_scale") for name in checkpoint.names()):
        raise ConfigError(
            "`kv_cache_dtype=int8` needs tensors `k_scale` and `v_scale` in every layer, and the "
            "checkpoint has none; use fp8, or a checkpoint calibrated for a cache of 8 bits"
        )


def load_over(place: Placement, folder: Any, dtype: Any) -> Any:
    """The parameters of an orbax folder, each part read to its device."""
    from octavo.models.sources.orbax import load

    model = place.model
    if model.shards.stage > 1:
        raise ConfigError(
            "an orbax folder keeps layers one by one, and stages stack them",
            "use the original checkpoint, or a mesh without `stage`",
        )
    if model.whole.sizes != model.config.sizes:
        raise ConfigError(
            "an orbax folder cannot be read with key-value heads repeated or a vocabulary padded, "
            f"as {model.shards.count} shards of this model need",
            "use the original checkpoint, or fewer shards",
        )
    places = place.abstract(model.abstract_params(dtype), place.params)
    params = load(folder, replace(places, rank=None))
    return replace(params, rank=place.put_weight(ranks(model), model.tensors.rank))


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
        context_buckets=resolved.context_buckets,
    )


def end_tokens(config: dict[str, Any], generation: dict[str, Any]) -> list[int]:
    """The model's end-of-sequence tokens: generation_config.json's set, then config.json's."""
    for source in (generation, config):
        ids = source.get("eos_token_id")
        if ids is not None:
            return [int(i) for i in (ids if isinstance(ids, list) else [ids])]
    return []


def place_of(backend: Backend, resolved: Resolved) -> Placement:
    """Where the arrays of an engine lie."""
    return Placement(resolved.mesh, resolved.model, None, backend.put)


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
