"""Tests that need eight devices: a process of their own, with eight virtual CPU devices.

test_mesh.py runs them. By hand: JAX_NUM_CPU_DEVICES=8 pytest tests/mesh/on_eight_devices.py
"""

import os
import re
from pathlib import Path
from typing import Any

import jax
import pytest

from octavo.engine.config import ConfigError, EngineConfig
from octavo.engine.core import EngineCore
from tests.engine.tiny import Client
from tests.models.check import prompt
from tests.models.tiny import FAMILIES, tiny_model

FULL = bool(os.environ.get("OCTAVO_MESH_FULL"))
COUNT = 64
LENGTHS = (3, 23, 40, 23)
# Of every family one way to cut it; the rest behind OCTAVO_MESH_FULL.
MESHES = {
    "llama": ("model=8", "data=2,model=2"),
    "llama_bias": ("model=2",),
    "mistral": ("model=4",),
    "qwen2": ("model=2",),
    "qwen3": ("model=4",),
    "gemma3": ("model=4",),
    "phi3": ("model=2",),
    "mixtral": ("expert=4", "model=2"),
    "qwen3_moe": ("expert=2,model=2",),
}
HEADS = 8


def folder_of(family: str, folder: Path) -> Path:
    """A tiny checkpoint whose sizes eight shards can cut."""
    if not folder.exists():
        more: dict[str, int] = {"num_attention_heads": HEADS} | (
            {"head_dim": 8} if family != "phi3" else {}
        )
        if family == "phi3":
            more["hidden_size"] = 64
        tiny_model(family, 0, **more).save_pretrained(folder)
    return folder


def engine(folder: Path, mesh: str, **more: Any) -> EngineCore:
    settings: dict[str, Any] = {
        "max_model_len": 128,
        "max_num_seqs": 3,
        "max_num_batched_tokens": 32,
        "page_size": 8,
        "num_pages": 26,  # less than three sequences of the longest need: some are preempted
        "compilation_cache": "none",
    }
    config = EngineConfig(model=str(folder), device="cpu", mesh=mesh, **(settings | more))
    config.validate()
    return EngineCore(config)


def texts(core: EngineCore) -> list[list[int]]:
    """Greedy and sampled, long and short, two with the same prompt: everything that there is."""
    client = Client(core)
    handles = []
    for i, length in enumerate(LENGTHS):
        sampled: dict[str, Any] = (
            {"temperature": 0.9, "seed": 7, "top_p": 0.95, "top_k": 30} if i == 1 else {}
        )
        if i == 2:
            sampled = {"repetition_penalty": 1.3, "logit_bias": {"9": 2.0}, "logprobs": 3}
        text = prompt(length, seed=i % 3)
        handles.append(client.add(text, max_tokens=COUNT, ignore_eos=True, **sampled))
        client.turn()
    client.drain()
    again = client.add(prompt(LENGTHS[2], seed=2), max_tokens=COUNT, ignore_eos=True)
    client.drain()
    assert core.stats().prefix_hits > 0 if hasattr(core.stats(), "prefix_hits") else True
    return [client.tokens[h] for h in (*handles, again)]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    base = tmp_path_factory.mktemp("checkpoints")
    expected: dict[str, list[list[int]]] = {}

    def get(family: str) -> tuple[Path, list[list[int]]]:
        folder = folder_of(family, base / family)
        if family not in expected:
            core = engine(folder, "")
            expected[family] = texts(core)
            core.close()
        return folder, expected[family]

    return get


EVERY = [
    (family, mesh)
    for family in FAMILIES
    for mesh in (("model=2", "model=4", "model=8", "data=2") if FULL else MESHES.get(family, ()))
]


@pytest.mark.parametrize(("family", "mesh"), EVERY)
def test_a_mesh_gives_the_tokens_of_one_device(family, mesh, checkpoints) -> None:
    folder, expected = checkpoints(family)
    core = engine(folder, mesh)
    try:
        assert texts(core) == expected
        assert core.stats().compiles_after_ready == 0
    finally:
        core.close()


COLLECTIVE = re.compile(r"= \S+ (all-reduce|all-gather|reduce-scatter|all-to-all|collective-\w+)\(")


def test_a_layer_has_two_all_reduces_and_no_other_collective(checkpoints) -> None:
    folder, _ = checkpoints("llama")
    core = engine(folder, "model=4")
    try:
        text = core.device.programs.forward[3, 0].as_text()
        found = COLLECTIVE.findall(text)
        layers = len(core.resolved.model.layer_specs)
        assert set(found) == {"all-reduce"}
        assert len(found) == 2 * layers + 1, "and one for the embedding"
    finally:
        core.close()


def test_a_mesh_that_cannot_be_is_refused_with_what_can(checkpoints) -> None:
    folder, _ = checkpoints("llama")
    with pytest.raises(ConfigError, match="8 query heads cannot be cut 3 ways; sizes .* 2, 4, 8"):
        engine(folder, "model=3")
    with pytest.raises(ConfigError, match="needs 16 devices, and 8 are here"):
        engine(folder, "model=16")
    with pytest.raises(ConfigError, match="no experts to lie on expert=2"):
        engine(folder, "expert=2")


def test_no_device_holds_more_than_its_part(checkpoints) -> None:
    folder, _ = checkpoints("llama")
    core = engine(folder, "model=8")
    try:
        layer = core.device.params.layers[0]
        assert len(jax.devices()) == 8
        for weight, axis in ((layer.attention.qkv.weight, 1), (layer.mlp.down.weight, 0)):
            part = weight.addressable_shards[0].data.shape
            assert part[axis] * 8 == weight.shape[axis]
    finally:
        core.close()
