"""What sentence-transformers' files say about pooling, and what is meant without them."""

import json
from pathlib import Path
from typing import Any

import pytest

from octavo.models.sources.base import Checkpoint, CheckpointError, NoTensors, TokenizerFiles
from octavo.models.sources.sentence import Pooling, is_sentence_model, pooling_of, sentence_files

KINDS = ("Transformer", "Pooling", "Normalize")


def checkpoint(folder: Path, **config: Any) -> Checkpoint:
    return Checkpoint(folder, "dummy", config, NoTensors("none"), TokenizerFiles())


def write(folder: Path, mode: str = "cls_token", kinds: tuple[str, ...] = KINDS) -> None:
    modules = [
        {"idx": i, "path": f"{i}_{kind}" if i else "", "type": f"sentence_transformers.{kind}"}
        for i, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    flags = {f"pooling_mode_{m}": m in mode.split("+") for m in (*mode.split("+"), "mean_tokens")}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(flags))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 128}))


@pytest.mark.parametrize(
    ("flag", "mode"),
    [("cls_token", "cls"), ("mean_tokens", "mean"), ("max_tokens", "max"), ("lasttoken", "last")],
)
def test_the_files_decide(tmp_path: Path, flag: str, mode: str) -> None:
    write(tmp_path, flag)
    assert pooling_of(checkpoint(tmp_path), encoder=True) == Pooling(mode, True, 128)
    assert is_sentence_model(checkpoint(tmp_path))
    assert set(sentence_files(tmp_path)) == {
        "modules.json",
        "sentence_bert_config.json",
        "1_Pooling/config.json",
    }


def test_without_a_normalize_part_vectors_keep_their_length(tmp_path: Path) -> None:
    write(tmp_path, kinds=KINDS[:2])
    assert not pooling_of(checkpoint(tmp_path), encoder=True).normalize


@pytest.mark.parametrize(("encoder", "mode"), [(True, "mean"), (False, "last")])
def test_without_files_a_model_is_read_as_its_kind_is_meant(
    tmp_path: Path, encoder: bool, mode: str
) -> None:
    assert pooling_of(checkpoint(tmp_path), encoder=encoder) == Pooling(mode)
    sized = checkpoint(tmp_path, matryoshka_dimensions=[32, 64])
    assert pooling_of(sized, encoder=encoder).dimensions == (32, 64)


@pytest.mark.parametrize(
    ("mode", "kinds", "says"),
    [
        ("cls_token+max_tokens", KINDS, "asks for the pooling cls_token and max_tokens"),
        ("weightedmean_tokens", KINDS, "asks for the pooling weightedmean_tokens"),
        ("cls_token", (*KINDS[:2], "Dense"), "has the part `Dense`, which is not supported"),
    ],
)
def test_what_is_not_known_is_refused_by_name(
    tmp_path: Path, mode: str, kinds: tuple[str, ...], says: str
) -> None:
    write(tmp_path, mode, kinds)
    with pytest.raises(CheckpointError, match=says):
        pooling_of(checkpoint(tmp_path), encoder=True)


@pytest.mark.parametrize(
    ("config", "activation"),
    [
        ({}, "sigmoid"),
        ({"sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"}, "identity"),
        ({"sentence_transformers": {"activation_fn": "torch.nn.Sigmoid"}}, "sigmoid"),
    ],
)
def test_a_cross_encoder_says_what_its_scores_go_through(
    tmp_path: Path, config: dict[str, Any], activation: str
) -> None:
    assert pooling_of(checkpoint(tmp_path, **config), encoder=True).activation == activation
