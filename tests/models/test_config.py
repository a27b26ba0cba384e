"""What is read from config.json, and what is refused with one sentence."""

from typing import Any

import pytest

from octavo.models.config import FAMILY_OF, ModelConfig, ModelConfigError
from octavo.models.registry import FAMILIES, build, layer_specs

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "eos_token_id": [2, 5],
    "bos_token_id": 1,
}


def windows(**changes: Any) -> tuple[tuple[int, int], ...]:
    """(group, window) of each layer, for sequences of up to 64 tokens."""
    model = build(ModelConfig.from_hf(LLAMA | changes), 64)
    return tuple((s.group, s.window) for s in model.layer_specs)


def test_letters_and_ids_are_read() -> None:
    config = ModelConfig.from_hf(LLAMA)
    sizes = (config.V, config.E, config.F, config.L, config.H, config.K, config.D, config.max_len)
    assert sizes == (128, 32, 48, 4, 4, 2, 8, 64)
    assert config.eos_ids == (2, 5)
    assert config.bos_id == 1
    assert not config.tied


def test_every_architecture_has_its_family() -> None:
    assert set(FAMILY_OF.values()) == set(FAMILIES)


@pytest.mark.parametrize(
    ("name", "experts", "family"),
    [("llama", 0, "llama"), ("llama", 8, "mixtral"), ("qwen3moe", 8, "qwen3_moe")],
)
def test_gguf_names_are_known(name: str, experts: int, family: str) -> None:
    config = LLAMA | {"architectures": [name], "num_local_experts": experts}
    assert ModelConfig.from_hf(config).family == family


def test_an_unknown_architecture_lists_what_is_supported() -> None:
    with pytest.raises(ModelConfigError) as error:
        ModelConfig.from_hf(LLAMA | {"architectures": ["MambaForCausalLM"], "model_type": "llama"})
    assert str(error.value) == (
        "unknown model architecture 'MambaForCausalLM'; supported are LlamaForCausalLM, "
        "MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM, Gemma3ForCausalLM, "
        "Gemma3ForConditionalGeneration, Phi3ForCausalLM, MixtralForCausalLM, "
        "Qwen3MoeForCausalLM, BertModel, RobertaModel, XLMRobertaModel"
    )


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"vocab_size": None}, "config.json has no 'vocab_size', which this model family needs"),
        (
            {"hidden_size": 0},
            "config.json says hidden_size is 0; it must be a whole number above 0",
        ),
        ({"num_key_value_heads": 3}, "4 attention heads and 3 key-value heads"),
        ({"hidden_act": "tan"}, "unknown activation 'tan'; supported are"),
        ({"layer_types": ["full_attention"]}, "4 layers but 1 layer_types"),
    ],
)
def test_a_bad_value_is_named(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ModelConfigError, match=sentence.replace(".", r"\.")):
        ModelConfig.from_hf(LLAMA | change)


def test_windows_in_every_layer_are_group_zero() -> None:
    mistral = {"architectures": ["MistralForCausalLM"]}
    assert windows(**mistral, sliding_window=8) == ((0, 8),) * 4
    assert windows(**mistral, sliding_window=None) == ((0, 0),) * 4


def test_llama_has_no_window_whatever_its_config_carries() -> None:
    assert windows(sliding_window=8) == ((0, 0),) * 4


def test_windows_beside_full_layers_are_group_one() -> None:
    qwen = {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 8, "max_window_layers": 3}
    assert windows(**qwen) == ((0, 0),) * 4
    assert windows(**qwen, use_sliding_window=True) == ((0, 0),) * 3 + ((1, 8),)


def test_a_window_that_no_sequence_outgrows_is_none() -> None:
    assert {s.window for s in layer_specs((64, 64), 64)} == {0}
    assert {s.window for s in layer_specs((64, 64), 65)} == {64}


def test_gemma_alternates_and_says_its_period() -> None:
    gemma = {"architectures": ["Gemma3ForCausalLM"], "num_hidden_layers": 14, "head_dim": 8}
    config = ModelConfig.from_hf(LLAMA | gemma | {"sliding_window": 8, "rope_theta": 1e6})
    model = build(config, 64)
    assert [s.group for s in model.layer_specs] == [1, 1, 1, 1, 1, 0] * 2 + [1, 1]
    assert model.period == 6
    assert build(ModelConfig.from_hf(LLAMA), 64).period == 1
    assert config.local_rope is not None
    assert (config.rope.theta, config.local_rope.theta) == (1e6, 1e4)


def test_a_multimodal_gemma_is_read_by_its_text_config() -> None:
    text: dict[str, Any] = {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
    }
    text |= {"sliding_window": 1024, "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}
    config = ModelConfig.from_hf(
        {
            "architectures": ["Gemma3ForConditionalGeneration"],
            "eos_token_id": [1, 106],
            "text_config": text,
            "vision_config": {"hidden_size": 1152},
        }
    )
    assert (config.E, config.H, config.K, config.D, config.V) == (2560, 8, 4, 256, 262_208)
    assert (config.rope.kind, config.rope.factor, config.rope.theta) == ("linear", 8.0, 1e6)
    assert config.local_rope is not None
    assert (config.local_rope.kind, config.local_rope.theta) == ("default", 1e4)
    assert config.eos_ids == (1, 106)
    assert config.tied
