"""Layers in stacks: the same weights, and the same text through the loop over them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.layout import Format, Layout

from octavo.models.config import ModelConfig
from octavo.models.load import load_params, random_params
from octavo.models.ops import Stacks
from octavo.models.registry import Model, build
from octavo.models.tensors import shape
from tests.engine.tiny import GEMMA3, LLAMA, SIZES

MOE = SIZES | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "norm_topk_prob": True,
}
MODELS = {
    "llama": LLAMA | {"num_hidden_layers": 3},
    "a last period that is not whole": GEMMA3 | {"num_hidden_layers": 5},
    "experts": MOE,
}


def checkpoint(model: Model) -> dict[str, np.ndarray]:
    """Random tensors by name, of the shapes that the model asks for."""
    random, sizes = np.random.default_rng(0), model.config.sizes
    pieces = [piece for t in jax.tree.leaves(model.tensors) for piece in t.pieces]
    return {p.name: random.standard_normal(shape(p.axes, sizes), np.float32) for p in pieces}


@pytest.mark.parametrize("name", MODELS)
def test_stacks_hold_the_layers_of_the_checkpoint(name: str) -> None:
    config = ModelConfig.from_hf(MODELS[name])
    plain, stacked = build(config, 64), build(config, 64, stacked=True)
    tensors = checkpoint(plain)
    one = load_params(plain, tensors.__getitem__, tensors, np.float32)
    other = load_params(stacked, tensors.__getitem__, tensors, np.float32)
    assert isinstance(other.layers, Stacks) and not isinstance(one.layers, Stacks)
    assert len(other.layers.rest) == (2 if name.startswith("a last") else 0)
    for want, got in zip(one.layers, other.layers.each(), strict=True):
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a.reshape(b.shape), b), want, got)
    shapes = jax.tree.map(lambda a: a.shape, other)
    abstract = jax.tree.map(lambda a: a.shape, stacked.abstract_params(np.float32))
    assert shapes == abstract


def test_a_stack_lies_as_the_backend_asks_from_the_first_layer_on() -> None:
    model = build(ModelConfig.from_hf(LLAMA), 64, stacked=True)

    def turned(axes: int, sharding: jax.sharding.Sharding) -> object:
        return Format(Layout((0, 2, 1)), sharding) if axes == 3 else sharding

    as_asked = random_params(model, 1, stack_format=turned)
    as_ever = random_params(model, 1)
    assert isinstance(as_asked.layers, Stacks)
    weight = as_asked.layers.periods[0].attention.qkv.weight
    assert weight.format.layout.major_to_minor == (0, 2, 1)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), as_asked, as_ever)
    assert jnp.isfinite(weight).all()
