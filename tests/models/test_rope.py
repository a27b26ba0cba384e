"""Inverse frequencies and their scale, beside those of transformers."""

from typing import Any

import numpy as np
import pytest
from transformers import LlamaConfig, Phi3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from octavo.models.config import ModelConfig, ModelConfigError
from octavo.models.rope import make_rope
from tests.models.check import Sequence, load, prompt, torch_logits
from tests.models.tiny import tiny_model

FACTORS = {"short_factor": [1.0, 1.1, 1.5, 2.0], "long_factor": [1.0, 2.0, 4.0, 8.0]}
SCALINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("llama", {"rope_type": "linear", "factor": 4.0}),
    "dynamic": ("llama", {"rope_type": "dynamic", "factor": 4.0}),
    "llama3": (
        "llama",
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        | {"original_max_position_embeddings": 32},
    ),
    "yarn": (
        "llama",
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    ),
    "yarn_mscale": (
        "llama",
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
        | {"mscale": 0.7, "mscale_all_dim": 1.2, "beta_fast": 16.0, "beta_slow": 2.0},
    ),
    "yarn_untruncated": (
        "llama",
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
        | {"truncate": False, "attention_factor": 1.25},
    ),
    "longrope": ("phi3", {"rope_type": "longrope"} | FACTORS),
}


def overrides(name: str) -> dict[str, Any]:
    """What a tiny config takes: the scaling, and a short pretraining length."""
    family, scaling = SCALINGS[name]
    own: dict[str, Any] = {"max_position_embeddings": 128 if family == "phi3" else 32}
    if family == "phi3":
        own |= {"original_max_position_embeddings": 32, "partial_rotary_factor": 1.0}
    return own | {"rope_parameters": {"rope_theta": 5000.0} | scaling}


@pytest.mark.parametrize("max_model_len", [16, 100])
@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_are_those_of_transformers(name: str, max_model_len: int) -> None:
    family, scaling = SCALINGS[name]
    kind = Phi3Config if family == "phi3" else LlamaConfig
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "head_dim": 8}
    sizes |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    theirs: Any = kind(**sizes | overrides(name))
    want, scale = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](theirs, "cpu", seq_len=max_model_len)
    config = ModelConfig.from_hf(theirs.to_dict() | {"architectures": [theirs_name(family)]})
    got = make_rope(config.rope, config.D, config.max_len, max_model_len)
    np.testing.assert_allclose(got.inv_freq, want.numpy(), rtol=1e-6)
    assert got.scale == pytest.approx(scale, rel=1e-6)
    assert got.inv_freq.dtype == np.float32


def theirs_name(family: str) -> str:
    return {"llama": "LlamaForCausalLM", "phi3": "Phi3ForCausalLM"}[family]


# transformers rescales dynamic and longrope by the length of each pass; ours is fixed by
# max_model_len. A pass as long as max_model_len is the same in both.
@pytest.mark.parametrize("length", [24, 48])
@pytest.mark.parametrize("name", SCALINGS)
def test_logits_are_those_of_transformers(name: str, length: int, tmp_path: Any) -> None:
    theirs = tiny_model(SCALINGS[name][0], **overrides(name))
    theirs.save_pretrained(tmp_path)
    model, params = load(tmp_path, max_model_len=length)
    got = Sequence(model, params)(prompt(length))
    np.testing.assert_allclose(got, torch_logits(theirs, prompt(length)), atol=1e-4, rtol=0)


def test_the_old_spelling_means_the_same() -> None:
    base = {"architectures": ["LlamaForCausalLM"], "vocab_size": 128, "hidden_size": 32}
    base |= {"intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    base |= {"max_position_embeddings": 64}
    scaling = {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}
    old = ModelConfig.from_hf(base | {"rope_theta": 1e6, "rope_scaling": scaling})
    new = ModelConfig.from_hf(
        base | {"rope_parameters": scaling | {"rope_theta": 1e6, "rope_type": "yarn"}}
    )
    assert old == new
    assert hash(old) == hash(new)


def test_an_unknown_scaling_is_refused_by_name() -> None:
    config = {"architectures": ["LlamaForCausalLM"], "vocab_size": 128, "hidden_size": 32}
    config |= {"intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config |= {"max_position_embeddings": 64, "rope_scaling": {"type": "spiral", "factor": 2}}
    with pytest.raises(ModelConfigError, match="unknown rope scaling 'spiral'; supported are"):
        ModelConfig.from_hf(config)
