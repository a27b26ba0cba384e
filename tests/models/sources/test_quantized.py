"""Quantized checkpoints: what their tools wrote comes back, and what cannot be read is named."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import save_file

from octavo.models.checkpoint import Checkpoint, CheckpointError, open_checkpoint
from octavo.models.sources.dequantize import unpacked

AT = "model.layers.0.mlp.up_proj"
FP8 = {"num_bits": 8, "type": "float"}
INT = {"num_bits": 8, "type": "int"}


def write(folder: Path, parts: dict[str, torch.Tensor], scheme: dict[str, Any]) -> Checkpoint:
    """One module, and a weight that is whole."""
    named = {f"{AT}.{part}": tensor.contiguous() for part, tensor in parts.items()}
    save_file({**named, "model.norm.weight": torch.ones(4)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": scheme}))
    return open_checkpoint(folder)


def read(folder: Path, parts: dict[str, torch.Tensor], scheme: dict[str, Any]) -> np.ndarray:
    checkpoint = write(folder, parts, scheme)
    assert sorted(checkpoint.names()) == [f"{AT}.weight", "model.norm.weight"]
    assert checkpoint.quantized == scheme["quant_method"]
    assert checkpoint.get("model.norm.weight").tolist() == [1, 1, 1, 1]
    got = checkpoint.get(f"{AT}.weight")
    assert got.dtype == np.float32 and got.shape == checkpoint.shape(f"{AT}.weight")
    return got


@pytest.mark.parametrize(
    ("form", "args", "scales"),
    [
        ("float-quantized", FP8 | {"strategy": "tensor"}, (1,)),
        ("float-quantized", FP8 | {"strategy": "channel"}, (96, 1)),
        ("float-quantized", FP8 | {"strategy": "block", "block_structure": [64, 32]}, (2, 4)),
        ("mxfp8-quantized", FP8 | {"strategy": "group", "group_size": 32}, (96, 4)),
        ("int-quantized", INT | {"strategy": "channel"}, (96, 1)),
        ("int-quantized", INT | {"strategy": "channel", "symmetric": False}, (96, 1)),
        *(
            ("pack-quantized", args | {"num_bits": bits, "type": "int"}, shape)
            for bits in (2, 3, 4, 8)
            for args, shape in (
                ({"strategy": "group", "group_size": 32}, (96, 4)),
                ({"strategy": "group", "group_size": 32, "symmetric": False}, (96, 4)),
                ({"strategy": "channel"}, (96, 1)),
            )
        ),
        ("nvfp4-pack-quantized", {"strategy": "tensor_group", "group_size": 16}, (96, 8)),
        ("mxfp4-pack-quantized", {"strategy": "group", "group_size": 32}, (96, 4)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_compressed_tensors_are_read_as_its_own_package_does(
    tmp_path: Path, form: str, args: dict[str, Any], scales: tuple[int, ...]
) -> None:
    args = dict[str, Any]({"num_bits": 4, "type": "float"} | args)
    weights = QuantizationArgs(**args)
    if form.startswith("mx"):
        weights.scale_dtype = torch.uint8
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    random = torch.Generator().manual_seed(0)
    whole = torch.randn(96, 128, generator=random)
    bits = int(args["num_bits"])
    largest = 2**bits if args["type"] == "int" else {8: 448, 4: 6}[bits]
    state = {"weight": whole, "weight_scale": torch.rand(scales, generator=random) * 4 / largest}
    if "mx" in form:
        state["weight_scale"] = 2.0 ** torch.randint(-6, -2, scales, generator=random)
    if args.get("symmetric") is False:
        half = 2 ** (bits - 1)
        zeros = torch.randint(-half, half, scales, generator=random)
        state["weight_zero_point"] = zeros.to(torch.int8)
    if form.startswith("nvfp4"):
        state["weight_global_scale"] = torch.tensor([64.0])
        state["weight_scale"] = state["weight_scale"] * 64
    compressor = BaseCompressor.get_value_from_registry(form)
    stored = compressor.compress(state, scheme)
    want = compressor.decompress(stored, scheme)["weight"].float().numpy()
    group = {"weights": {k: v for k, v in args.items() if v is not None}, "format": form}
    config = {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": group},
    }
    got = read(tmp_path, stored | {"input_global_scale": torch.ones(1)}, config)
    np.testing.assert_allclose(got, want, rtol=1e-2 if "fp4" in form else 1e-6)
    assert np.corrcoef(got.ravel(), whole.numpy().ravel())[0, 1] > 0.7  # it was the weight


def test_columns_of_a_packed_weight_may_be_of_any_group(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    values, groups = random.integers(0, 16, (4, 32)), random.permutation(np.arange(32) % 2)
    scales = random.random((4, 2)).astype(np.float32)
    parts = {
        "weight_packed": torch.from_numpy(words(values, 4)),
        "weight_scale": torch.from_numpy(scales),
        "weight_shape": torch.tensor([4, 32]),
        "weight_g_idx": torch.from_numpy(groups.astype(np.int32)),
    }
    got = read(tmp_path, parts, {"quant_method": "compressed-tensors", "config_groups": {"0": {}}})
    np.testing.assert_allclose(got, (values - 8) * scales[:, groups])


@pytest.mark.parametrize("shape", [(256, 384), (200, 300), (100, 60)])
def test_fp8_in_blocks_whose_last_ones_are_cut(tmp_path: Path, shape: tuple[int, int]) -> None:
    random = np.random.default_rng(0)
    stored = torch.from_numpy(random.normal(size=shape)).to(torch.float8_e4m3fn)
    scales = random.random((-(-shape[0] // 128), -(-shape[1] // 128))).astype(np.float32)
    scheme = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    got = read(tmp_path, {"weight": stored, "weight_scale_inv": torch.from_numpy(scales)}, scheme)
    for row, column in ((0, 0), (shape[0] - 1, shape[1] - 1), (99, 59)):
        want = float(stored[row, column]) * scales[row // 128, column // 128]
        assert got[row, column] == pytest.approx(want, rel=1e-6)


def test_fp8_with_one_scale_and_those_of_activations(tmp_path: Path) -> None:
    stored = torch.linspace(-3, 3, 32).reshape(4, 8).to(torch.float8_e4m3fn)
    parts = {"weight": stored, "weight_scale": torch.tensor(0.5), "input_scale": torch.tensor(2.0)}
    got = read(tmp_path, parts, {"quant_method": "fp8", "activation_scheme": "static"})
    np.testing.assert_array_equal(got, stored.float().numpy() / 2)


def words(values: np.ndarray, bits: int) -> np.ndarray:
    """i32[rows, n] of whole numbers [rows, count], the definition: one long number a row."""
    count = values.shape[1] * bits // 32
    rows = [sum(int(v) << (bits * i) for i, v in enumerate(row)) for row in values]
    parts = [[(row >> (32 * i)) & 0xFFFFFFFF for i in range(count)] for row in rows]
    return np.array(parts, np.uint32).view(np.int32)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 7, 8])
def test_numbers_of_any_width_come_out_of_their_words(bits: int) -> None:
    values = np.random.default_rng(bits).integers(0, 2**bits, (3, 64))
    np.testing.assert_array_equal(unpacked(words(values, bits), bits, 64), values)


@pytest.mark.parametrize("form", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq(tmp_path: Path, bits: int, ordered: bool, form: str) -> None:
    N, M, size = 32, 96, 32
    random = np.random.default_rng(bits)
    values = random.integers(0, 2**bits, (N, M))
    zeros = random.integers(1, 2**bits, (N, M // size))
    scales = random.random((N, M // size)).astype(np.float16)
    groups = np.arange(M) // size
    if not ordered:
        groups = random.permutation(groups)
    stored = zeros - (form == "gptq")
    parts = {
        "qweight": torch.from_numpy(words(values, bits).T),
        "qzeros": torch.from_numpy(words(stored.T, bits)),
        "scales": torch.from_numpy(scales.T),
        "g_idx": torch.from_numpy(groups.astype(np.int32)),
        "bias": torch.zeros(N),  # some tools write one where the model has none
    }
    scheme = {"quant_method": "gptq", "bits": bits, "group_size": size, "checkpoint_format": form}
    got = read(tmp_path, parts, scheme)
    want = (values - zeros[:, groups]) * scales[:, groups].astype(np.float32)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    parts["bias"] = torch.ones(N)
    assert f"{AT}.bias" in write(tmp_path, parts, scheme).names()


def test_awq(tmp_path: Path) -> None:
    N, M, size = 24, 64, 32
    random = np.random.default_rng(0)
    values, zeros = random.integers(0, 16, (N, M)), random.integers(0, 16, (N, M // size))
    scales = random.random((N, M // size)).astype(np.float16)
    order = [0, 2, 4, 6, 1, 3, 5, 7]  # of the columns in a word, the lowest bits first

    def packed(columns: np.ndarray) -> torch.Tensor:
        mixed = columns.reshape(len(columns), -1, 8)[:, :, order]
        return torch.from_numpy(words(mixed.reshape(len(columns), -1), 4))

    parts = {
        "qweight": packed(values.T),
        "qzeros": packed(zeros.T),
        "scales": torch.from_numpy(scales.T),
    }
    got = read(tmp_path, parts, {"quant_method": "awq", "version": "gemm", "bits": 4})
    groups = np.arange(M) // size
    want = (values - zeros[:, groups]) * scales[:, groups].astype(np.float32)
    np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize("nested", [False, True])
def test_bitsandbytes_in_4_bits(tmp_path: Path, nested: bool) -> None:
    random = np.random.default_rng(0)
    places = random.integers(0, 16, (8, 64))
    table = np.sort(random.normal(size=16)).astype(np.float32)
    largest = random.random(8).astype(np.float32)
    state: dict[str, Any] = {"quant_type": "nf4", "blocksize": 64, "shape": [8, 64]}
    pairs = places.reshape(-1, 2)
    parts = {
        "weight": torch.from_numpy((pairs[:, :1] * 16 + pairs[:, 1:]).astype(np.uint8)),
        "weight.quant_map": torch.from_numpy(table),
        "weight.absmax": torch.from_numpy(largest),
    }
    if nested:
        inner, outer = random.normal(size=256).astype(np.float32), np.array([0.5, 2.0], np.float32)
        small = random.integers(0, 256, 8).astype(np.uint8)
        largest = inner[small] * np.repeat(outer, 4) + np.float32(0.25)
        state |= {"nested_blocksize": 4, "nested_offset": 0.25}
        parts |= {
            "weight.absmax": torch.from_numpy(small),
            "weight.nested_absmax": torch.from_numpy(outer),
            "weight.nested_quant_map": torch.from_numpy(inner),
        }
    text = np.frombuffer(json.dumps(state).encode(), np.uint8).copy()
    parts["weight.quant_state.bitsandbytes__nf4"] = torch.from_numpy(text)
    got = read(tmp_path, parts, {"quant_method": "bitsandbytes", "load_in_4bit": True})
    np.testing.assert_allclose(got, table[places] * largest[:, None], rtol=1e-6)


def test_bitsandbytes_in_8_bits(tmp_path: Path) -> None:
    parts = {
        "weight": torch.tensor([[127, -64], [1, 2]], dtype=torch.int8),
        "SCB": torch.tensor([2.0, 127.0]),
        "weight_format": torch.tensor(0, dtype=torch.uint8),
    }
    got = read(tmp_path, parts, {"quant_method": "bitsandbytes", "load_in_8bit": True})
    np.testing.assert_allclose(got, np.array([[2, -128 / 127], [1, 2]]), rtol=1e-6)


def test_modelopt_names_its_scheme_in_a_file_of_its_own(tmp_path: Path) -> None:
    parts = {
        "weight": torch.tensor([[0x21, 0x9F] * 8], dtype=torch.uint8),  # 0.5, 1; -6, -0.5
        "weight_scale": torch.full((1, 2), 4.0).to(torch.float8_e4m3fn),
        "weight_scale_2": torch.tensor(0.5),
        "input_scale": torch.tensor(1.0),
    }
    write(tmp_path, parts, {})
    (tmp_path / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "NVFP4"}}')
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.quantized == "modelopt"
    got = checkpoint.get(f"{AT}.weight")
    np.testing.assert_array_equal(got, np.tile([1, 2, -12, -1], 8)[None])


@pytest.mark.parametrize(
    ("scheme", "sentence"),
    [
        ({"quant_method": "quark"}, "quantized with 'quark', which cannot be read (not fp8, "),
        ({"quant_method": "awq", "version": "gemv"}, "the checkpoint is awq in the form 'gemv'"),
        ({"quant_method": "compressed-tensors", "format": "marlin-24"}, "is packed as 'marlin-24'"),
        (
            {
                "quant_method": "compressed-tensors",
                "sparsity_config": {"format": "sparse-24-bitmask"},
            },
            "is packed as 'sparse-24-bitmask'",
        ),
        (
            {"quant_method": "compressed-tensors", "transform_config": {"R1": {}}},
            "weights are rotated",
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {
                    "a": {"weights": {"block_structure": [128, 128]}},
                    "b": {"weights": {"block_structure": [64, 64]}},
                },
            },
            "in blocks of several sizes",
        ),
    ],
)
def test_what_cannot_be_read_is_said_when_it_is_opened(
    tmp_path: Path, scheme: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(CheckpointError) as error:
        write(tmp_path, {"weight": torch.ones(2, 2)}, scheme)
    assert sentence in str(error.value)
    assert str(error.value).endswith(": take the unquantized checkpoint or a GGUF file")


def test_whole_numbers_without_a_scale_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds whole numbers and no scale is beside it"):
        write(tmp_path, {"weight": torch.ones(2, 2, dtype=torch.int8)}, {"quant_method": "fp8"})


def test_scales_that_do_not_fit_are_an_error(tmp_path: Path) -> None:
    parts = {
        "weight": torch.ones(8, 8).to(torch.float8_e4m3fn),
        "weight_scale": torch.ones(3, 1),
    }
    checkpoint = write(tmp_path, parts, {"quant_method": "fp8"})
    with pytest.raises(CheckpointError, match=r"weight of \[8, 8\] has scales of \[3, 1\]"):
        checkpoint.get(f"{AT}.weight")


def test_a_scheme_of_the_cache_alone_leaves_weights_as_they_are(tmp_path: Path) -> None:
    scheme = {"quant_method": "compressed-tensors", "kv_cache_scheme": {"num_bits": 8}}
    checkpoint = write(tmp_path, {"weight": torch.ones(2, 2)}, scheme)
    assert checkpoint.quantized == ""
