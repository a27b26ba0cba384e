"""Layers in stacks: the same weights, and the same text through the loop over them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from octavo.backends import plain
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


def test_blocks_of_columns_are_the_same_matrix() -> None:
    config = ModelConfig.from_hf(MOE | {"intermediate_size": 64})
    whole = random_params(build(config, 64, stacked=True), 1)
    blocks = random_params(build(config, 64, stacked=True, columns=8), 1)
    assert isinstance(whole.layers, Stacks) and isinstance(blocks.layers, Stacks)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 32), np.float32))
    for one, other in zip(whole.layers.each(), blocks.layers.each(), strict=True):
        for a, b in (
            (one.attention.qkv, other.attention.qkv),
            (one.attention.out, other.attention.out),
        ):
            assert b.weight.ndim == 3
            np.testing.assert_allclose(plain.linear(x, b), plain.linear(x, a), rtol=1e-5)
        assert other.mlp.gate_up.shape == (4, 4, 32, 8)
        sizes = jnp.array([1, 0, 2, 0], jnp.int32)
        np.testing.assert_allclose(
            plain.grouped_linear(x, other.mlp.gate_up, sizes),
            plain.grouped_linear(x, one.mlp.gate_up, sizes),
            rtol=1e-5,
        )
