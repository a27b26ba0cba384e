"""Safetensors folders: what is read equals what was written, and damage is one sentence."""

import json

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from octavo.models.checkpoint import CheckpointError, open_checkpoint


def write_folder(folder, shards=1):
    tensors = {
        "a.weight": torch.arange(12, dtype=torch.bfloat16).reshape(3, 4),
        "b.weight": torch.linspace(0, 1, 6).reshape(2, 3),
        "c.weight": torch.tensor(2.5, dtype=torch.float16),
    }
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
    else:
        names = {}
        for i, (name, tensor) in enumerate(tensors.items()):
            file = f"model-{i + 1:05d}-of-{len(tensors):05d}.safetensors"
            save_file({name: tensor}, folder / file)
            names[name] = file
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return tensors


@pytest.mark.parametrize("shards", [1, 3])
def test_what_is_read_is_what_was_written(tmp_path, shards):
    tensors = write_folder(tmp_path, shards)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.format == "safetensors"
    assert checkpoint.config["architectures"] == ["LlamaForCausalLM"]
    assert checkpoint.generation_config == {"eos_token_id": [1, 2]}
    assert sorted(checkpoint.names()) == sorted(tensors)
    assert checkpoint.nbytes == 12 * 2 + 6 * 4 + 2
    for name, tensor in tensors.items():
        assert checkpoint.shape(name) == tuple(tensor.shape)
        np.testing.assert_array_equal(
            checkpoint.get(name).astype(np.float32), tensor.float().numpy()
        )
    assert checkpoint.get("a.weight").dtype == ml_dtypes.bfloat16
    kept = checkpoint.get("b.weight")
    checkpoint.close()
    assert kept[0, 0] == 0.0  # an array outlives the checkpoint
    with pytest.raises(ValueError, match="read-only"):
        kept[0, 0] = 1


def test_a_name_that_is_not_there_is_named(tmp_path):
    write_folder(tmp_path)
    with pytest.raises(CheckpointError, match="the checkpoint has no tensor `z`"):
        open_checkpoint(tmp_path).get("z")


def test_a_missing_shard_is_named(tmp_path):
    write_folder(tmp_path, shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match="1 of 3 shards are missing .*00002-of-00003"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("keep", [0, 5, 40, -1])
def test_a_file_cut_off_anywhere_is_one_sentence(tmp_path, keep):
    write_folder(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="download it again") as error:
        open_checkpoint(tmp_path)
    assert "\n" not in str(error.value)


def test_a_header_that_lies_is_refused(tmp_path):
    write_folder(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(b'"shape":[2,3]', b'"shape":[2,9]'))
    with pytest.raises(CheckpointError, match=r"`b.weight` of shape \[2, 9\] .* 24 bytes"):
        open_checkpoint(tmp_path)


def test_bad_json_says_where(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "config.json").write_text('{"a": ')
    with pytest.raises(CheckpointError, match="config.json` is not valid JSON .*line 1"):
        open_checkpoint(tmp_path)


def test_pickled_weights_are_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="can run code when read: convert"):
        open_checkpoint(tmp_path)
