"""Tests that need eight devices: a process of their own, with eight virtual CPU devices.

test_mesh.py runs them. By hand: JAX_NUM_CPU_DEVICES=8 pytest tests/mesh/on_eight_devices.py
"""

import os
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from octavo.engine import stages
from octavo.engine.config import ConfigError, EngineConfig
from octavo.engine.core import EngineCore
from octavo.engine.mesh import Placement, make_mesh
from octavo.engine.messages import Logprobs
from octavo.models.tensors import Tensor, kept
from tests.engine.tiny import Client
from tests.models.check import prompt
from tests.models.tiny import FAMILIES, tiny_model

FULL = bool(os.environ.get("OCTAVO_MESH_FULL"))
COUNT = 64
LENGTHS = (3, 23, 40, 23)
Said = list[tuple[list[int], list[float]]]  # tokens, and the log probabilities that were asked for
# What is cut in a way of its own: few heads, biases (and two copies), windows, experts. The rest is
# behind OCTAVO_MESH_FULL.
MESHES = {
    "llama": ("model=8", "stage=2,model=2"),
    "llama_bias": ("data=2,model=2",),
    "gemma3": ("model=4",),
    "qwen3_moe": ("expert=2,model=2",),
}
ALL = {"mixtral": ("expert=4",)}
STAGES = ("stage=2", "stage=2,model=2", "data=2,stage=2")
HEADS = 8
# Layers that repeat, so that stages can be alike.
DEEP: dict[str, dict[str, Any]] = {
    "gemma3": {"num_hidden_layers": 12},
    "qwen3_moe": {"num_hidden_layers": 4, "mlp_only_layers": [1, 3]},
}


def folder_of(family: str, folder: Path) -> Path:
    """A tiny checkpoint whose sizes eight shards can cut."""
    if not folder.exists():
        more: dict[str, Any] = {"num_attention_heads": HEADS} | (
            {"head_dim": 8} if family != "phi3" else {}
        )
        more |= DEEP.get(family, {}) if FULL else {}
        if family == "phi3":
            more["hidden_size"] = 64
        if family == "llama_bias":
            more["vocab_size"] = 1030  # so many that shards have whole lanes, the last one padding
        tiny_model(family, 0, **more).save_pretrained(folder)
    return folder


def engine(folder: Path, mesh: str, **more: Any) -> EngineCore:
    settings: dict[str, Any] = {
        "max_model_len": 128,
        "max_num_seqs": 3,
        "max_num_batched_tokens": 32,
        "page_size": 8,
        # Less than three of the longest sequences need, or two in each data shard: some are
        # preempted.
        "num_pages": 18 if "data" in mesh else 26,
        "compilation_cache": "none",
    }
    config = EngineConfig(model=str(folder), device="cpu", mesh=mesh, **(settings | more))
    config.validate()
    return EngineCore(config)


def texts(core: EngineCore) -> Said:
    """Greedy and sampled, long and short, two with the same prompt: everything that there is."""
    client = Client(core)
    handles = []
    for i, length in enumerate(LENGTHS):
        sampled: dict[str, Any] = (
            {"temperature": 0.9, "seed": 7, "top_p": 0.95, "top_k": 30} if i == 1 else {}
        )
        if i == 2:
            sampled = {
                "repetition_penalty": 1.3,
                "logit_bias": {"9": 2.0},
                "logprobs": 3,
                "prompt_logprobs": 2,
            }
        text = prompt(length, seed=i % 3)
        handles.append(client.add(text, max_tokens=COUNT, ignore_eos=True, **sampled))
        client.turn()
    client.drain()
    again = client.add(prompt(LENGTHS[2], seed=2), max_tokens=COUNT, ignore_eos=True)
    client.drain()
    stats = core.stats()
    if not all(group.window for group in core.resolved.dims.groups):  # windows give pages back
        assert stats.prefix_hits > 0 and stats.preemptions > 0
    return [(client.tokens[h], drawn(client.logprobs.get(h, []))) for h in (*handles, again)]


def drawn(parts: list[Logprobs]) -> list[float]:
    """The log probabilities of the tokens that there are."""
    return [float(value) for part in parts for value in np.frombuffer(part.logprobs, np.float32)]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    base = tmp_path_factory.mktemp("checkpoints")
    expected: dict[str, Said] = {}

    def get(family: str) -> tuple[Path, Said]:
        folder = folder_of(family, base / family)
        if family not in expected:
            core = engine(folder, "")
            expected[family] = texts(core)
            core.close()
        return folder, expected[family]

    return get


@pytest.fixture(scope="module")
def eighths(checkpoints):
    """A Llama of which each of eight devices has its part."""
    core = engine(checkpoints("llama")[0], "model=8")
    yield core
    core.close()


EVERY = [
    (family, mesh)
    for family in FAMILIES
    for mesh in (
        ("model=2", "model=4", "model=8", "data=2", "data=2,model=2", *ALL.get(family, ()), *STAGES)
        if FULL
        else MESHES.get(family, ())
    )
]


@pytest.mark.parametrize(("family", "mesh"), EVERY)
def test_a_mesh_gives_the_tokens_of_one_device(
    family, mesh, checkpoints, request, monkeypatch
) -> None:
    if (family, "stage" in mesh) == ("qwen2_window", True):
        pytest.skip("its first half of layers is not as its second")
    folder, expected = checkpoints(family)
    monkeypatch.setattr(stages, "LEAST", 1)  # several micro-batches, few as the tokens are
    shared = (family, mesh) == ("llama", "model=8")
    core = request.getfixturevalue("eighths") if shared else engine(folder, mesh)
    try:
        for (tokens, values), (own_tokens, own_values) in zip(expected, texts(core), strict=True):
            assert own_tokens == tokens
            np.testing.assert_allclose(own_values, values, atol=1e-4)
        assert core.stats().compiles_after_ready == 0
    finally:
        if not shared:
            core.close()


COLLECTIVE = re.compile(r"= \S+ (all-reduce|all-gather|reduce-scatter|all-to-all|collective-\w+)\(")


def test_a_layer_has_two_all_reduces_and_no_other_collective(eighths) -> None:
    text = eighths.device.programs.made["forward 3 rows + 0 tokens"].as_text()
    found = COLLECTIVE.findall(text)
    layers = len(eighths.resolved.model.layer_specs)
    assert set(found) == {"all-reduce"}
    assert len(found) == 2 * layers + 1, "and one for the embedding"


def test_a_mesh_that_cannot_be_is_refused_with_what_can(checkpoints) -> None:
    folder, _ = checkpoints("llama")
    with pytest.raises(ConfigError, match="8 query heads .*cannot be cut 3 ways; sizes .* 2, 4, 8"):
        engine(folder, "model=3")
    with pytest.raises(ConfigError, match="needs 16 devices, and 8 are here"):
        engine(folder, "model=16")
    with pytest.raises(ConfigError, match="`mesh=data=9` needs 9 devices, and 8 are here"):
        engine(folder, "data=9")
    with pytest.raises(ConfigError, match="copies the model, and graphs for these cores only cut"):
        make_mesh({"data": 2}, (), cores=8)
    with pytest.raises(ConfigError, match="no experts to lie on expert=2"):
        engine(folder, "expert=2")
    with pytest.raises(ConfigError, match="2 layers cannot be cut into 3 stages .* fit: 2$"):
        engine(folder, "stage=3")
    with pytest.raises(ConfigError, match="stage`, and graphs for these cores have all layers"):
        make_mesh({"stage": 2}, (), cores=8)


def test_no_device_holds_more_than_its_part(eighths) -> None:
    layer = eighths.device.params.layers[0]
    assert len(jax.devices()) == 8
    for weight, axis in ((layer.attention.qkv.weight, 1), (layer.mlp.down.weight, 0)):
        part = weight.addressable_shards[0].data.shape
        assert part[axis] * 8 == weight.shape[axis]


def test_a_flat_matrix_is_cut_before_it_is_laid_out() -> None:
    no_model: Any = None
    place = Placement(make_mesh({"model": 4}, jax.devices()), no_model)
    gate_up = np.arange(6 * 2 * 64, dtype=np.float32).reshape(6, 2, 64)
    for columns, shape in ((0, (6, 128)), (8, (16, 6, 8))):
        tensor = Tensor("E 2 F", (), flat=2, columns=columns)
        put = place.put_weight(gate_up, tensor)
        assert put.shape == shape
        for rank, device in enumerate(place.mesh.devices.flat):
            (shard,) = (s for s in put.addressable_shards if s.device == device)
            mine = gate_up[:, :, 16 * rank : 16 * (rank + 1)]
            np.testing.assert_array_equal(shard.data, kept(tensor, mine))


@pytest.mark.usefixtures("without_the_cache_of_jax")
def test_a_second_start_finds_the_programs_of_its_mesh_and_no_others(checkpoints, tmp_path) -> None:
    folder, _ = checkpoints("llama")
    few = {"max_num_seqs": 1, "num_pages": 0, "max_num_batched_tokens": 8}
    for mesh, there in (("", 0), ("model=2", 0), ("", 1), ("model=2", 1)):
        core = engine(folder, mesh, compilation_cache=str(tmp_path), **few)
        try:
            programs = core.device.programs
            assert programs.found == (len(programs.made) if there else 0)
            client = Client(core)
            handle = client.add(prompt(5), max_tokens=3, ignore_eos=True)
            client.drain()
            assert len(client.tokens[handle]) == 3
        finally:
            core.close()
