"""GGUF: every quantization, the converter's changes undone, damage named."""

from typing import Any

import gguf
import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from octavo.models.checkpoint import CheckpointError, open_checkpoint
from octavo.models.sources.gguf import to_float
from octavo.models.sources.gguf_names import restore_rows

HEADS, KV_HEADS, HEAD, WIDTH, FORWARD, VOCAB = 4, 2, 8, 32, 64, 40


def converter_permutes(weight, heads):
    """What llama.cpp's converter does to query and key rows, in its own order of axes."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path, arch, tensors, **metadata):
    """A tiny model: `metadata` is over the architecture's usual keys."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    for key, value in metadata.items():
        add: Any = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        if isinstance(value, str):
            add = writer.add_string
        add(f"{arch}.{key.replace('__', '.')}", value)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{i}" for i in range(VOCAB - 1)] + ["<|im_end|>"])
    writer.add_token_types([1] * (VOCAB - 1) + [3])
    writer.add_eos_token_id(3)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def random(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def llama_tensors():
    return {
        "token_embd.weight": random(VOCAB, WIDTH),
        "output_norm.weight": random(WIDTH),
        "blk.0.attn_norm.weight": random(WIDTH),
        "blk.0.attn_q.weight": converter_permutes(random(HEADS * HEAD, WIDTH), HEADS),
        "blk.0.attn_k.weight": converter_permutes(random(KV_HEADS * HEAD, WIDTH), KV_HEADS),
        "blk.0.ffn_up.weight": random(FORWARD, WIDTH).astype(np.float16),
    }


def test_restoring_rows_undoes_the_converter():
    weight = random(HEADS * HEAD, WIDTH)
    np.testing.assert_array_equal(restore_rows(converter_permutes(weight, HEADS), HEADS), weight)


def test_llama_names_shapes_types_and_row_order(tmp_path):
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", "llama", llama_tensors()))
    prefix = "model.layers.0."
    q = checkpoint.get(prefix + "self_attn.q_proj.weight")
    np.testing.assert_array_equal(q, random(HEADS * HEAD, WIDTH))
    k = checkpoint.get(prefix + "self_attn.k_proj.weight")
    np.testing.assert_array_equal(k, random(KV_HEADS * HEAD, WIDTH))
    assert checkpoint.get(prefix + "mlp.up_proj.weight").dtype == np.float16
    assert checkpoint.shape("model.embed_tokens.weight") == (VOCAB, WIDTH)
    config = checkpoint.config
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["tie_word_embeddings"] is True
    assert (config["head_dim"], config["vocab_size"]) == (HEAD, VOCAB)
    assert (config["rms_norm_eps"], config["rope_theta"]) == (1e-5, 10000.0)
    assert checkpoint.generation_config == {"eos_token_id": [3, VOCAB - 1]}


def test_quantized_query_rows_are_put_back_in_order(tmp_path):
    weight = random(HEADS * HEAD, WIDTH)
    stored = gguf.quantize(converter_permutes(weight, HEADS), GGMLQuantizationType.Q8_0)
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for add, value in (
        (writer.add_block_count, 1),
        (writer.add_context_length, 8),
        (writer.add_embedding_length, WIDTH),
        (writer.add_head_count, HEADS),
    ):
        add(value)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tensor("blk.0.attn_q.weight", stored, raw_dtype=GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    got = open_checkpoint(path).get("model.layers.0.self_attn.q_proj.weight")
    # Q8_0 keeps 127 steps of each block's largest value.
    np.testing.assert_allclose(got, weight, atol=np.abs(weight).max() / 127)


def test_experts_become_one_tensor_each(tmp_path):
    stacked = random(3, FORWARD, WIDTH)
    tensors = {"token_embd.weight": random(VOCAB, WIDTH), "blk.0.ffn_up_exps.weight": stacked}
    mixtral = open_checkpoint(
        write_gguf(tmp_path / "a.gguf", "llama", tensors, expert_count=3, expert_used_count=2)
    )
    assert mixtral.config["architectures"] == ["MixtralForCausalLM"]
    name = "model.layers.0.block_sparse_moe.experts.2.w3.weight"
    np.testing.assert_array_equal(mixtral.get(name), stacked[2])
    qwen = open_checkpoint(
        write_gguf(
            tmp_path / "b.gguf",
            "qwen3moe",
            tensors,
            expert_count=3,
            expert_used_count=2,
            expert_feed_forward_length=FORWARD,
        )
    )
    assert qwen.config["num_experts"] == 3
    np.testing.assert_array_equal(
        qwen.get("model.layers.0.mlp.experts.1.up_proj.weight"), stacked[1]
    )


def test_gemma_norms_lose_the_one_that_was_added(tmp_path):
    norm = random(WIDTH)
    path = write_gguf(
        tmp_path / "m.gguf",
        "gemma3",
        {"blk.0.ffn_norm.weight": norm + np.float32(1), "token_embd.weight": random(VOCAB, WIDTH)},
        attention__sliding_window=16,
        attention__key_length=HEAD,
    )
    checkpoint = open_checkpoint(path)
    got = checkpoint.get("model.layers.0.pre_feedforward_layernorm.weight")
    np.testing.assert_array_equal(got, norm + np.float32(1) - np.float32(1))
    assert checkpoint.config["layer_types"] == ["sliding_attention"]
    assert checkpoint.config["sliding_window"] == 16


def test_phi3_keeps_its_fused_names_and_its_rope_factors(tmp_path):
    short, long = np.ones(4, np.float32), np.full(4, 2.0, np.float32)
    path = write_gguf(
        tmp_path / "m.gguf",
        "phi3",
        {
            "token_embd.weight": random(VOCAB, WIDTH),
            "blk.0.attn_qkv.weight": random((HEADS + 2 * KV_HEADS) * HEAD, WIDTH),
            "blk.0.ffn_up.weight": random(2 * FORWARD, WIDTH),
            "rope_factors_short.weight": short,
            "rope_factors_long.weight": long,
        },
        rope__dimension_count=HEAD,
        rope__scaling__original_context_length=64,
    )
    checkpoint = open_checkpoint(path)
    assert checkpoint.shape("model.layers.0.mlp.gate_up_proj.weight") == (2 * FORWARD, WIDTH)
    assert "model.layers.0.self_attn.qkv_proj.weight" in checkpoint.names()
    scaling = checkpoint.config["rope_scaling"]
    assert scaling["rope_type"] == "longrope"
    assert (scaling["short_factor"], scaling["long_factor"]) == ([1.0] * 4, [2.0] * 4)
    assert not any("rope" in name for name in checkpoint.names())


def test_llama3_factors_become_its_rule_and_others_stay_as_they_are(tmp_path):
    theta, half = 500000.0, 64
    wavelength = 2 * np.pi * theta ** (np.arange(half) / half)
    smooth = np.clip((8192 / wavelength - 1) / 3, 0, 1)
    factors = (1 / ((1 - smooth) / 32 + smooth)).astype(np.float32)
    for values, kind in ((factors, "llama3"), (factors * 2 + 1, "longrope")):
        path = write_gguf(
            tmp_path / f"{kind}.gguf",
            "llama",
            {"token_embd.weight": random(VOCAB, WIDTH), "rope_freqs.weight": values},
            rope__freq_base=theta,
        )
        scaling = open_checkpoint(path).config["rope_scaling"]
        assert scaling["rope_type"] == kind
        if kind == "llama3":
            assert (scaling["factor"], scaling["original_max_position_embeddings"]) == (32.0, 8192)
        else:
            assert scaling["long_factor"] == pytest.approx(values.tolist())


def test_yarn_and_linear_scaling_are_named(tmp_path):
    tensors = {"token_embd.weight": random(VOCAB, WIDTH)}
    path = write_gguf(
        tmp_path / "y.gguf",
        "qwen3",
        tensors,
        rope__scaling__type="yarn",
        rope__scaling__factor=4.0,
        rope__scaling__original_context_length=32,
    )
    assert open_checkpoint(path).config["rope_scaling"] == {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32,
    }


# Internal to llama.cpp's dot products, or without a rule in the package.
NOT_IN_FILES = ("Q8_1", "Q8_K", "Q1_0")
QUANTIZED = [k for k in GGMLQuantizationType if k.name[0] in "QMNT" or k.name[:2] == "IQ"]
QUANTIZED = [k for k in QUANTIZED if k.name not in NOT_IN_FILES]


@pytest.mark.parametrize("kind", QUANTIZED, ids=lambda kind: kind.name)
def test_every_quantization_dequantizes_like_the_package(kind):
    block, block_bytes = GGML_QUANT_SIZES[kind]
    rows, row_blocks = 300, 8  # more than one chunk, and a chunk's border inside a row
    raw = np.random.default_rng(0).integers(0, 256, (rows, row_blocks * block_bytes), np.uint8)
    with np.errstate(all="ignore"):  # random bytes make infinite scales
        want = gguf.dequantize(raw, kind)
        got = to_float(raw, kind).reshape(rows, row_blocks * block)
    np.testing.assert_array_equal(got, want)
    assert got.dtype == np.float32


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "BF16", "TQ1_0", "MXFP4"])
def test_what_was_quantized_comes_back_close(name):
    kind = GGMLQuantizationType[name]
    weight = random(4, 256)
    got = to_float(gguf.quantize(weight, kind), kind).astype(np.float32).reshape(weight.shape)
    # Relative error of the coarsest: ternary keeps three values a block, the others 16 and more.
    limit = {"TQ1_0": 0.9, "MXFP4": 0.2}.get(name, 0.12)
    assert np.linalg.norm(got - weight) / np.linalg.norm(weight) < limit


@pytest.mark.parametrize("keep", [0, 3, 20, 200, 900, -1])
def test_a_file_cut_off_anywhere_is_one_sentence(tmp_path, keep):
    path = write_gguf(tmp_path / "m.gguf", "llama", llama_tensors())
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(path)
    assert "\n" not in str(error.value)
    assert "`" in str(error.value)


def test_damage_in_the_header_is_one_sentence(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", "llama", llama_tensors())
    whole = path.read_bytes()
    random_bytes = np.random.default_rng(1)
    for _ in range(200):
        at = int(random_bytes.integers(0, 900))
        damaged = whole[:at] + random_bytes.bytes(4) + whole[at + 4 :]
        path.write_bytes(damaged)
        try:
            open_checkpoint(path)
        except CheckpointError as error:
            assert "\n" not in str(error)  # whatever else is raised fails the test


def test_an_unknown_architecture_says_which_are_known(tmp_path):
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match="unknown architecture `mamba`: known are llama"):
        open_checkpoint(path)


def test_a_missing_part_is_named(tmp_path):
    write_gguf(tmp_path / "m-00001-of-00002.gguf", "llama", llama_tensors())
    with pytest.raises(CheckpointError, match="1 of 2 parts are missing .*00002-of-00002"):
        open_checkpoint(tmp_path / "m-00001-of-00002.gguf")
