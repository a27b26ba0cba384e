"""`--mesh auto`: as few devices as hold the model well, and a line that says why."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from octavo.backends.select import select
from octavo.engine.auto_mesh import sizes_of
from octavo.engine.config import EngineConfig
from octavo.models.config import ModelConfig
from octavo.models.load import param_bytes
from octavo.models.registry import build
from tests.engine.tiny import LLAMA

FACTS = ModelConfig.from_hf(LLAMA | {"num_attention_heads": 8, "num_key_value_heads": 2})
WHOLE = param_bytes(build(FACTS, FACTS.max_len), np.float32)


def chosen(times: float, *, devices: int = 8, shared: bool = False) -> tuple[Any, str]:
    """The choice for devices that each hold so many times the weights."""
    cpu = select("cpu")
    several = replace(cpu, devices=cpu.devices[:1] * devices, shared_memory=shared)
    config = EngineConfig(mesh="auto", memory_utilization=1.0)
    config.validate()
    return sizes_of(config, several, FACTS, np.float32, int(WHOLE * times))


@pytest.mark.parametrize(
    ("times", "sizes"),
    [
        (8.1, {"data": 8}),
        (7.9, {}),
        (3.0, {}),
        (1.5, {"model": 2}),
        (0.75, {"model": 4}),
        (0.1, {"model": 8}),
    ],
)
def test_auto_takes_the_fewest_devices_with_room_for_as_much_cache_or_copies(times, sizes) -> None:
    found, line = chosen(times)
    assert found == sizes
    whole = "a copy on each of 8" if times > 8 else "fewest of 8"
    assert ("most of 8" if times == 0.1 else whole) in line
    assert line.startswith(",".join(f"{axis}={n}" for axis, n in sizes.items()) or "one device")


def test_a_mesh_with_more_shards_than_heads_says_that_heads_are_repeated() -> None:
    assert "each key-value head on 2 devices" in chosen(0.75)[1]


def test_devices_of_one_memory_are_not_cut() -> None:
    assert chosen(0.1, shared=True) == ({}, "one device (auto: all have the same memory)")


def test_one_device_is_one_device() -> None:
    assert chosen(0.1, devices=1)[0] == {}
