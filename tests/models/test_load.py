"""Weights find their places, or the sentence says which do not."""

import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from octavo.models.config import ModelConfig
from octavo.models.load import LoadError, load_params, param_bytes, random_params
from octavo.models.ops import Stacks
from octavo.models.plain_ops import empty_cache, plain_ops
from octavo.models.registry import Model, build
from octavo.models.tensors import Tensor
from tests.models.check import Sequence, prompt, torch_logits
from tests.models.tiny import FAMILIES, tiny_model


def setup(family: str = "llama", **overrides: Any) -> tuple[Any, Model, dict[str, np.ndarray]]:
    """The transformers model, ours, and the tensors as they would lie in a checkpoint."""
    theirs = tiny_model(family, **overrides)
    tensors = {k: v.detach().numpy() for k, v in theirs.state_dict().items()}
    name = type(theirs).__name__
    config = ModelConfig.from_hf(theirs.config.to_dict() | {"architectures": [name]})
    return theirs, build(config, 64), tensors


def test_a_missing_and_an_unknown_tensor_are_both_named() -> None:
    _, model, tensors = setup()
    tensors["model.layers.0.extra.weight"] = tensors.pop("model.norm.weight")
    with pytest.raises(LoadError) as error:
        load_params(model, tensors.__getitem__, tensors, np.float32)
    assert str(error.value) == (
        "the checkpoint lacks 1 tensor (model.norm.weight), "
        "and it has 1 tensor (model.layers.0.extra.weight) that the model does not know"
    )


def test_an_unknown_tensor_alone_is_an_error() -> None:
    _, model, tensors = setup()
    tensors["model.norm.weight_scale"] = np.ones(1, np.float32)
    with pytest.raises(LoadError, match=r"has 1 tensor \(model.norm.weight_scale\)"):
        load_params(model, tensors.__getitem__, tensors, np.float32)


def test_a_wrong_shape_names_the_tensor_and_both_shapes() -> None:
    _, model, tensors = setup()
    tensors["model.layers.1.mlp.up_proj.weight"] = np.zeros((47, 32), np.float32)
    with pytest.raises(LoadError, match=r"layers.1.mlp.up_proj.weight has shape \[47, 32\].*asks"):
        load_params(model, tensors.__getitem__, tensors, np.float32)


def test_buffers_and_a_tied_head_are_left_alone() -> None:
    theirs, model, tensors = setup(tie_word_embeddings=True)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(4, np.float32)
    assert "lm_head.weight" in tensors
    params = load_params(model, tensors.__getitem__, tensors, np.float32)
    assert params.head is None
    want = torch_logits(theirs, prompt(9))
    np.testing.assert_allclose(Sequence(model, params)(prompt(9)), want, atol=1e-4, rtol=0)


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_the_text_model_of_a_multimodal_checkpoint_is_found(prefix: str) -> None:
    theirs, model, tensors = setup("gemma3")
    tensors.pop("lm_head.weight", None)
    tensors = {k.replace("model.", prefix, 1): v for k, v in tensors.items()}
    tensors["vision_tower.patch.weight"] = np.zeros(3, np.float32)
    params = load_params(model, tensors.__getitem__, tensors, np.float32)
    want = torch_logits(theirs, prompt(9))
    np.testing.assert_allclose(Sequence(model, params)(prompt(9)), want, atol=1e-4, rtol=0)


def test_progress_ends_at_the_bytes_of_all_parameters() -> None:
    _, model, tensors = setup()
    seen: list[tuple[str, int, int]] = []
    params = load_params(
        model,
        tensors.__getitem__,
        tensors,
        ml_dtypes.bfloat16,
        progress=lambda *step: seen.append(step),
    )
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert seen[-1][1:] == (total, total)
    assert total == param_bytes(model, ml_dtypes.bfloat16)
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)


@pytest.mark.parametrize("family", FAMILIES)
def test_random_weights_have_the_abstract_shapes_and_finite_logits(family: str) -> None:
    _, model, _ = setup(family)
    params = random_params(model, seed=1, dtype=jnp.bfloat16)
    abstract = model.abstract_params(jnp.bfloat16)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), params) == jax.tree.map(
        lambda a: (a.shape, a.dtype), abstract
    )
    hidden, _ = jax.eval_shape(lambda p: _forward(model, p), abstract)
    assert hidden.shape == (8, model.config.E)
    logits = Sequence(model, random_params(model, seed=1))(prompt(8))
    assert np.isfinite(logits).all()
    assert logits.dtype == np.float32
    assert 0.05 < logits.std() < 20


def _forward(model: Model, params: Any) -> Any:
    positions = jnp.arange(8)
    cache = empty_cache(model, 8, jnp.bfloat16)
    return model.forward(params, positions, positions, cache, plain_ops(positions))


def test_a_dropped_window_keeps_its_own_theta() -> None:
    theirs, _, tensors = setup("gemma3", tie_word_embeddings=True)
    config = ModelConfig.from_hf(theirs.config.to_dict() | {"architectures": ["Gemma3ForCausalLM"]})
    model = build(config, 8)
    assert {s.window for s in model.layer_specs} == {0}
    params = load_params(model, tensors.__getitem__, tensors, np.float32)
    want = torch_logits(theirs, prompt(8))
    np.testing.assert_allclose(Sequence(model, params)(prompt(8)), want, atol=1e-4, rtol=0)


def test_bfloat16_stays_close_to_float32() -> None:
    # Some twenty roundings of 2**-9 relative error each, added as if independent: about 1 %.
    _, model, tensors = setup()
    wide = load_params(model, tensors.__getitem__, tensors, np.float32)
    narrow = load_params(model, tensors.__getitem__, tensors, ml_dtypes.bfloat16)
    want = Sequence(model, wide)(prompt(9))
    positions = jnp.arange(9)
    cache, ops = empty_cache(model, 9, jnp.bfloat16), plain_ops(positions)
    hidden, _ = model.forward(narrow, jnp.asarray(prompt(9)), positions, cache, ops)
    assert hidden.dtype == jnp.bfloat16
    logits = model.logits(narrow, hidden, ops)
    assert logits.dtype == jnp.float32
    error = float(np.sqrt(np.mean((np.asarray(logits) - want) ** 2)))
    assert error < 0.04 * want.std()


def test_scales_of_the_cache_are_found_by_any_of_their_names() -> None:
    theirs, _, tensors = setup()
    config = ModelConfig.from_hf(
        theirs.config.to_dict()
        | {"architectures": ["LlamaForCausalLM"]}
        | {"quantization_config": {"kv_cache_scheme": {"num_bits": 8}}}
    )
    at = "model.layers.{}.self_attn."
    tensors[at.format(0) + "k_scale"] = np.float16(0.5) * np.ones((1,), np.float16)
    tensors[at.format(0) + "v_proj.v_scale"] = np.array([[[2.0]], [[4.0]]], np.float32)
    plain = load_params(build(config, 64), tensors.__getitem__, tensors, np.float32)
    assert isinstance(plain.layers, tuple)
    assert plain.layers[0].attention.kv_scales is None  # left alone by a cache of more bits
    for stacked in (False, True):
        model = build(replace(config, kv_scales=True), 64, stacked=stacked)
        params = load_params(model, tensors.__getitem__, tensors, jnp.bfloat16)
        layers = params.layers.each() if isinstance(params.layers, Stacks) else params.layers
        first, second = (layer.attention.kv_scales for layer in layers)
        assert first.dtype == np.float32
        assert first.tolist() == [[0.5, 0.5], [2.0, 4.0]]
        assert second.tolist() == [[1, 1], [1, 1]]
        assert sum(x.nbytes for x in jax.tree.leaves(params)) == param_bytes(model, jnp.bfloat16)
    tensors[at.format(1) + "k_scale"] = np.ones(3, np.float32)
    with pytest.raises(LoadError, match=r"1.self_attn.k_scale has shape \[3\].*asks for \[2\]"):
        load_params(model, tensors.__getitem__, tensors, np.float32)


def test_the_host_holds_one_parameter_at_a_time() -> None:
    _, model, stored = setup()
    live: list[int] = []
    most = 0
    before: Callable[[], Any] = int  # of no array yet

    def get(name: str) -> np.ndarray:
        nonlocal most
        array = stored[name].copy()
        live.append(array.nbytes)
        weakref.finalize(array, live.remove, array.nbytes)
        most = max(most, sum(live))
        return array

    def put(array: np.ndarray, tensor: Tensor) -> jax.Array:
        nonlocal before
        assert not isinstance(before(), np.ndarray) and live == []
        before = weakref.ref(array if array.base is None else array.base)
        return jnp.zeros((1,))

    load_params(model, get, stored, np.float32, put=put)
    assert most <= 2 * max(array.nbytes for array in stored.values())
