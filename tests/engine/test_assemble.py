"""From a folder to weights in their places."""

import json
import logging
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from octavo.engine.assemble import assemble
from octavo.engine.config import EngineConfig
from octavo.models.config import ModelConfig
from octavo.models.load import load_params
from octavo.models.registry import build
from tests.models.tiny import tiny_model


def test_a_quantized_model_is_the_model_of_its_dequantized_weights(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    theirs = tiny_model("llama", tie_word_embeddings=True)
    stored, whole = {}, {}
    for name, tensor in theirs.state_dict().items():
        if name.endswith("_proj.weight"):
            scale = tensor.abs().amax(1, keepdim=True) / 448
            stored[name] = (tensor / scale).to(torch.float8_e4m3fn)
            stored[f"{name}_scale"] = scale
            whole[name] = (stored[name].float() * scale).numpy()
        elif name != "lm_head.weight":
            stored[name] = tensor
            whole[name] = tensor.numpy()
    scheme = {"quant_method": "compressed-tensors", "config_groups": {"0": {}}}
    config = theirs.config.to_dict() | {"architectures": ["LlamaForCausalLM"]}
    save_file(stored, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": scheme}))
    with caplog.at_level(logging.INFO, "octavo"):
        parts = assemble(EngineConfig(model=str(tmp_path), device="cpu"))
    assert "weights  read from compressed-tensors, kept as float32" in caplog.messages
    want = load_params(
        build(ModelConfig.from_hf(config), parts.resolved.max_model_len),
        whole.__getitem__,
        whole,
        np.float32,
    )
    for ours, other in zip(jax.tree.leaves(parts.params), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(ours, other)
