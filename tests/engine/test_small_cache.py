"""Caches of 8 bits: the text is that of one sequence alone with the same rounding."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from octavo.engine.assemble import assemble
from octavo.engine.config import ConfigError, EngineConfig
from tests.engine.tiny import LLAMA, Client, Reference, make_engine, make_parts, prompt


def test_requests_that_share_a_prefix_get_the_text_of_a_dense_cache_of_fp8() -> None:
    sizes: dict[str, Any] = dict(max_num_seqs=2, max_num_batched_tokens=32, max_model_len=96)
    parts = make_parts(LLAMA, kv_cache_dtype="fp8", num_pages=14, **sizes)
    assert parts.resolved.kv_dtype == ml_dtypes.float8_e4m3fn
    full = make_parts(LLAMA, num_pages=14, **sizes)
    assert parts.resolved.memory.cache * 4 == full.resolved.memory.cache
    reference, core = Reference(parts), make_engine(parts)
    client, first = Client(core), prompt(37)
    asked = [first, first[:32] + prompt(3), prompt(5)]
    handles = [client.add(tokens, max_tokens=8, ignore_eos=True) for tokens in asked]
    client.drain()
    for handle, tokens in zip(handles, asked, strict=True):
        assert client.tokens[handle] == reference.text(tokens, 8, ignore_eos=True)
    core.close()


def test_int8_without_scales_is_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    empty = {"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    header = json.dumps(empty).encode()
    weights = len(header).to_bytes(8, "little") + header + np.zeros(1, np.float32).tobytes()
    (tmp_path / "model.safetensors").write_bytes(weights)
    sizes: dict[str, Any] = dict(num_pages=14, max_num_seqs=2, compilation_cache="none")
    config = EngineConfig(model=str(tmp_path), device="cpu", kv_cache_dtype="int8", **sizes)
    with pytest.raises(ConfigError, match="`k_scale` and `v_scale` in every layer.*use fp8"):
        assemble(config)
