"""Repositories of the hub, from its cache on disk: nothing here needs a network."""

import pytest
import torch
from safetensors.torch import save_file

from octavo.models.checkpoint import CheckpointError, locate, open_checkpoint

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """The snapshot folder of team/model in a hub cache of its own."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    root = tmp_path / "models--team--model"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(COMMIT)
    snapshot = root / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    return snapshot


def test_a_downloaded_repository_opens_offline(repository):
    save_file({"a": torch.ones(2)}, repository / "model.safetensors")
    checkpoint = open_checkpoint("team/model", offline=True)
    assert checkpoint.names() == ["a"]
    assert checkpoint.path == repository
    assert open_checkpoint("team/model", offline=True, revision=COMMIT).names() == ["a"]


def test_one_of_many_gguf_files_is_chosen_by_name_or_quantization(repository):
    for name in ("m-Q4_K_M.gguf", "m-Q8_0.gguf"):
        (repository / name).write_bytes(b"GGUF")
    for name in ("team/model:Q8_0", "team/model/m-Q8_0.gguf"):
        assert locate(name, offline=True) == repository / "m-Q8_0.gguf"
    with pytest.raises(CheckpointError, match="has 2 GGUF files: name one, as in team/model/m-Q4"):
        locate("team/model", offline=True)
    with pytest.raises(CheckpointError, match="has no file like"):
        locate("team/model:Q2_K", offline=True)


def test_a_repository_without_weights_says_so(repository):
    with pytest.raises(CheckpointError, match="neither safetensors nor GGUF weights"):
        open_checkpoint("team/model", offline=True)
    dummy = open_checkpoint("team/model", offline=True, load_format="dummy")
    assert dummy.config["architectures"] == ["LlamaForCausalLM"]


def test_a_revision_that_is_not_there_is_named(repository):
    with pytest.raises(CheckpointError, match="`team/model` at revision `v9` is not on disk"):
        open_checkpoint("team/model", offline=True, revision="v9")
