"""How a model is cut: sizes of all shards together and of one."""

from dataclasses import replace

import pytest

from octavo.models.config import ModelConfig
from octavo.models.shards import Shards, local, whole
from tests.engine.tiny import LLAMA


@pytest.mark.parametrize(
    "V, ways, each",
    [
        (151936, 4, 38016),  # 297 whole lanes of 128, where 296.75 would do
        (128256, 8, 16128),
        (32001, 8, 4096),
        (1023, 2, 512),
        (500, 2, 250),  # so few that lanes would be a large part, or leave a shard without any
        (2050, 8, 257),
    ],
)
def test_a_large_vocabulary_is_cut_into_whole_lanes_and_no_shard_is_empty(
    V: int, ways: int, each: int
) -> None:
    config = replace(ModelConfig.from_hf(LLAMA), V=V)
    shards = Shards(model=ways)
    all_ = whole(config, shards)
    assert (all_.V, all_.real_V, local(config, shards).V) == (each * ways, V, each)
    assert each * (ways - 1) < V, "the last one has some"
