"""EngineConfig: YAML, checks, and their sentences."""

from dataclasses import fields
from pathlib import Path

import pytest

from octavo.engine.config import ConfigError, EngineConfig, flag, parse_mesh, settings_table

pytestmark = pytest.mark.smoke


def test_the_defaults_are_valid() -> None:
    EngineConfig().validate()
    assert EngineConfig().overrides() == {}


def test_a_yaml_file_takes_dashes_or_underscores_and_arguments_win(tmp_path: Path) -> None:
    path = tmp_path / "octavo.yaml"
    path.write_text("model: here\nmax-num-seqs: 8\nenable_prefix_caching: false\n")
    config = EngineConfig.from_yaml(path, max_num_seqs=4)
    assert config.model == "here"
    assert config.max_num_seqs == 4
    assert not config.enable_prefix_caching


def test_an_empty_yaml_file_is_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "octavo.yaml"
    path.write_text("# nothing yet\n")
    assert EngineConfig.from_yaml(path) == EngineConfig()


@pytest.mark.parametrize(
    ("text", "sentence", "hint"),
    [
        ("max_num_seq: 8\n", "there is no setting `max_num_seq`", "did you mean `max_num_seqs`?"),
        ("- 1\n", "must hold `name: value` lines, got a list", "max_num_seqs: 64"),
        ("a: b: c\n", "is not YAML", ""),
        ("seed: many\n", "`seed` must be int, got 'many' (str)", "--seed"),
        ("offline: 1\n", "`offline` must be bool, got 1 (int)", "--offline"),
        ("max_num_seqs: true\n", "`max_num_seqs` must be int, got True (bool)", "--max-num-seqs"),
    ],
)
def test_a_yaml_file_that_cannot_work_is_named(
    tmp_path: Path, text: str, sentence: str, hint: str
) -> None:
    path = tmp_path / "octavo.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        EngineConfig.from_yaml(path)
    assert sentence in caught.value.message
    assert hint in caught.value.hint


def test_a_yaml_file_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*nowhere\.yaml: no such file"):
        EngineConfig.from_yaml("nowhere.yaml")


@pytest.mark.parametrize(
    ("setting", "sentence", "hint"),
    [
        ({"model": ""}, "`model` is empty", "smollm2-135m"),
        ({"dtype": "float15"}, "`dtype` must be one of auto, float32", "did you mean `float16`?"),
        ({"device": "xyz"}, "`device` must be one of", "write --device auto"),
        ({"max_model_len": 0}, "`max_model_len` must be `auto` or at least 1, got 0", "4096"),
        ({"max_model_len": "all"}, "`max_model_len` must be `auto`", "auto takes"),
        ({"max_num_seqs": -1}, "`max_num_seqs` must be at least 0, got -1", "default is 0"),
        ({"steps_in_flight": 9}, "`steps_in_flight` must be from 1 to 8, got 9", "default is 2"),
        ({"memory_utilization": 1.5}, "above 0, at most 1, got 1.5", "0.9"),
        ({"memory_utilization": 0.0}, "above 0, at most 1, got 0.0", "0.9"),
        ({"num_pages": 1}, "`num_pages` must be at least 2, got 1", "0 takes"),
        ({"page_size": 24}, "`page_size` must be a power of two, got 24", "0 takes"),
        ({"mesh": "tensor=2"}, "no axis `tensor`: data, model, expert, stage", "--mesh model=8"),
        ({"mesh": "model=0"}, "at least 1 device on `model`, got '0'", "--mesh model=8"),
        ({"mesh": "model=2,model=2"}, "names the axis `model` twice", "--mesh model=8"),
    ],
)
def test_a_setting_that_cannot_work_gets_one_sentence_and_a_hint(
    setting: dict[str, object], sentence: str, hint: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        EngineConfig.from_mapping(setting)
    assert sentence in caught.value.message
    assert hint in caught.value.hint
    assert not caught.value.message.endswith(".")
    assert str(caught.value) == f"{caught.value.message}\nhint: {caught.value.hint}"


def test_a_whole_number_is_a_share_of_memory() -> None:
    assert EngineConfig.from_mapping({"memory_utilization": 1}).memory_utilization == 1


def test_a_mesh_is_sizes_by_axis() -> None:
    assert parse_mesh("") == {}
    assert parse_mesh("data=2, model=4") == {"data": 2, "model": 4}


def test_every_setting_has_a_row_in_the_table() -> None:
    rows = settings_table().splitlines()[2:]
    assert [row.split("`")[1] for row in rows] == [f.name for f in fields(EngineConfig)]
    assert all(flag(f.name) in row for f, row in zip(fields(EngineConfig), rows, strict=True))


def test_every_setting_says_what_it_is() -> None:
    assert all(f.metadata["help"] for f in fields(EngineConfig))
