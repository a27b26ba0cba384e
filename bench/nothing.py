"""An engine whose model computes nothing: what is left of a step is the engine itself."""

import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import msgspec
import numpy as np

from octavo.backends.select import select
from octavo.engine.assemble import Parts
from octavo.engine.config import EngineConfig
from octavo.engine.core import EngineCore
from octavo.engine.memory import resolve
from octavo.engine.messages import AddRequest
from octavo.engine.sampling_params import SamplingParams
from octavo.models.config import ModelConfig, RopeConfig
from octavo.models.ops import LayerSpec
from octavo.models.registry import Model

WARM_STEPS = 20
CHUNK = 8192  # prompt tokens per step, so that long contexts are soon there

NOTHING = ModelConfig(
    family="none",
    architecture="none",
    V=256,
    E=8,
    L=1,
    H=1,
    K=1,
    D=8,
    F=8,
    eps=1e-6,
    max_len=1 << 20,
    rope=RopeConfig(),
)


def measure(slots: int, context: int, steps: int, in_flight: int) -> list[float]:
    """Microseconds of host time of each steady decode step, all slots decoding."""
    config = EngineConfig(
        max_num_seqs=slots,
        # The first slots decode while the last prompts are still run: leave room for that.
        max_model_len=context + steps + WARM_STEPS + 256 + 2 * slots * context // CHUNK,
        max_num_batched_tokens=CHUNK,
        steps_in_flight=in_flight,
        enable_prefix_caching=False,
    )
    core = EngineCore(config, parts=empty_parts(config))
    try:
        for request in requests(slots, context, config):
            core.add(request)
        while core.has_work() and not steady(core, slots):
            core.turn()
        for _ in range(WARM_STEPS):
            core.turn()
        samples = [one_turn(core) for _ in range(steps)]
        assert steady(core, slots), "a sequence ended while it was measured"
        assert not core.stats().compiles_after_ready
        return samples
    finally:
        core.close()


def one_turn(core: EngineCore) -> float:
    """Microseconds of one turn and of encoding what it gave, without waiting for the device."""
    waited = core.reader.counts.waited
    began = time.perf_counter()
    outputs = core.turn()
    encoded = [msgspec.msgpack.encode(output) for output in outputs]
    elapsed = time.perf_counter() - began - (core.reader.counts.waited - waited)
    assert encoded, "a steady turn gives an output"
    return 1e6 * elapsed


def steady(core: EngineCore, slots: int) -> bool:
    """Whether every slot decodes and nothing else happens."""
    host = core.host
    return host.running == slots and int(np.sum(host.decoding)) == slots and not host.prefilling


def requests(slots: int, context: int, config: EngineConfig) -> Iterator[AddRequest]:
    """One request per slot, with a prompt of `context` tokens, that never ends on its own."""
    rng = np.random.default_rng(0)
    sampling = SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True)
    for handle in range(slots):
        prompt = rng.integers(0, NOTHING.V, context).astype(np.int32).tobytes()
        yield AddRequest(
            handle=handle,
            request_id=str(handle),
            prompt=prompt,
            sampling=sampling,
            arrival=time.monotonic(),
        )


def empty_parts(config: EngineConfig) -> Parts:
    """An engine's parts with a model that computes nothing and has no weights."""
    backend = select(config.device)
    model = Model(
        config=NOTHING,
        max_model_len=int(config.max_model_len),
        forward=_forward,
        logits=_logits,
        layer_specs=(LayerSpec(),),
        attention=(NOTHING.H, NOTHING.K, NOTHING.D),
        period=1,
        tensors=(),  # a tree without leaves: no weights
    )
    resolved = resolve(config, backend, NOTHING, model)
    return Parts(backend, resolved, (), [], 0.0)


def _forward(
    params: Any, tokens: jax.Array, positions: jax.Array, cache: Any, ops: Any
) -> tuple[jax.Array, Any]:
    # Not a constant: XLA of jaxlib 0.10.0 crashes when it folds one into the rest of the step.
    return jnp.broadcast_to(tokens[:, None], (tokens.shape[0], NOTHING.E)).astype(
        jnp.float32
    ), cache


def _logits(params: Any, hidden: jax.Array, ops: Any) -> jax.Array:
    # Not a constant either: XLA would spend minutes on folding what is sampled from it.
    return jnp.broadcast_to(hidden[:, :1] * 0, (hidden.shape[0], NOTHING.V))
