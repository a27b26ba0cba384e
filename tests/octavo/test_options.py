"""Flags are made from EngineConfig: what is typed, what the file says, what is the default."""

import argparse
from dataclasses import fields
from pathlib import Path

import pytest

from octavo.cli.local_server import config_flags
from octavo.cli.options import add_config_flags, config_from_args
from octavo.engine.config import ConfigError, EngineConfig, flag

pytestmark = pytest.mark.smoke


def parse(*words: str) -> EngineConfig:
    parser = argparse.ArgumentParser()
    add_config_flags(parser)
    return config_from_args(parser.parse_args(words))


def test_nothing_typed_is_the_defaults() -> None:
    assert parse() == EngineConfig()


def test_there_is_a_flag_for_every_setting() -> None:
    parser = argparse.ArgumentParser()
    add_config_flags(parser)
    known = {option for action in parser._actions for option in action.option_strings}
    assert {flag(f.name) for f in fields(EngineConfig)} <= known


def test_the_model_is_the_first_argument_or_a_flag() -> None:
    assert parse("here").model == "here"
    assert parse("--model", "here").model == "here"
    assert parse("here", "--model", "here").model == "here"
    with pytest.raises(ConfigError, match="two models are named: here and --model there"):
        parse("here", "--model", "there")


def test_flags_win_over_the_file_and_the_file_over_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "octavo.yaml"
    path.write_text("max-num-seqs: 8\nsteps_in_flight: 3\noffline: true\n")
    config = parse("--config", str(path), "--max-num-seqs", "4", "--no-offline")
    assert (config.max_num_seqs, config.steps_in_flight, config.offline) == (4, 3, False)


def test_a_flag_at_its_default_still_wins_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "octavo.yaml"
    path.write_text("steps_in_flight: 3\n")
    assert parse("--config", str(path), "--steps-in-flight", "2").steps_in_flight == 2


def test_a_length_is_a_number_or_auto() -> None:
    assert parse("--max-model-len", "4096").max_model_len == 4096
    assert parse("--max-model-len", "auto").max_model_len == "auto"
    with pytest.raises(ConfigError, match="`max_model_len` must be `auto` or at least 1"):
        parse("--max-model-len", "long")


def test_a_config_gives_flags_that_give_the_config() -> None:
    config = EngineConfig(
        model="there", enable_prefix_caching=False, memory_utilization=0.5, mesh="model=8", seed=7
    )
    assert parse(*config_flags(config)) == config
