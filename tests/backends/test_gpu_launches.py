"""How many kernels a decode step launches on a GPU, compiled for an H100 that need not be there."""

import importlib.util
import re
from dataclasses import replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from octavo.backends import gpu, plain
from octavo.backends.record import Backend
from octavo.engine import functions
from octavo.engine.plan import plan_size
from octavo.engine.state import Dims, PageGroup
from octavo.engine.step import Machine
from octavo.models.config import ModelConfig
from octavo.models.ops import Linear
from octavo.models.registry import build
from octavo.pallas_kernels.sampling import NS

PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not any(importlib.util.find_spec(name) for name in PLUGINS),
        reason="jax without its CUDA plugin cannot compile for a GPU; install octavo[cuda]",
    ),
]

H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84929347584 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  driver_version: "13.0.0" runtime_version: "13.0.0"
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 7 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 256,
    "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 128,
    "vocab_size": 512, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 512,
    "hidden_act": "silu", "tie_word_embeddings": True,
}  # fmt: skip


def backend(packed: int) -> Backend:
    """The GPU's record, made without one."""
    choices, capability = replace(gpu.CHOICES, packed=packed), (9, 0)
    return Backend(
        name="gpu",
        reason="a test",
        devices=(),
        attend=partial(gpu.attend, capability=capability),
        attend_packed=partial(gpu.attend_packed, choices=choices, capability=capability),
        gated_linear=partial(gpu.gated_linear, choices=choices, capability=capability),
        init_cache=plain.init_cache,
        page_bytes=plain.page_bytes,
        linear=plain.linear,
        grouped_linear=plain.grouped_linear,
        layers=plain.layers,
        row_buckets=lambda most: (most,),
        token_buckets=lambda most: (most,),
        max_num_seqs=32,
        max_num_batched_tokens=256,
        page_size=64,
        dtype="bfloat16",
        memory_limit=lambda: 0,
        why_not=lambda config: None,
    )


def compiled(function: Any, arguments: Any) -> Any:
    """The jitted function for an H100; arguments are abstract."""
    topology = topologies.get_topology_desc(platform="cuda", target_config=H100, topology="1x1x1")
    mesh = Mesh(np.array(topology.devices).reshape(1), ("one",), axis_types=(AxisType.Auto,))
    place = NamedSharding(mesh, PartitionSpec())
    placed = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), arguments
    )
    with jax.set_mesh(mesh):
        return function.lower(*placed).compile()


@cache
def launches(layers: int, rows: int, packed: int, tokens: int = 0) -> int:
    """Kernels, library calls and copies of one step."""
    model = build(ModelConfig.from_hf(QWEN3 | {"num_hidden_layers": layers}), 512)
    groups = (PageGroup(window=0, pages=64),)
    dims = Dims(32, 64, 512, 512, groups, controls=NS, max_chunk=256, counts=False)
    machine = Machine(dims, model, backend(packed))

    def cache() -> Any:
        heads, size = model.attention[1:]
        return plain.init_cache(model.layer_specs, [64], 64, heads, size, jnp.bfloat16)

    state = jax.eval_shape(lambda: functions.new_state(machine, cache))
    step = jax.jit(functions.forward(machine, rows, tokens), donate_argnums=(1,))
    plan = (jax.ShapeDtypeStruct((1, plan_size(dims)), jnp.int32),) if tokens else ()
    text = compiled(step, (model.abstract_params(jnp.bfloat16), state, *plan)).as_text()
    assert text is not None
    entry = text[text.index("\nENTRY ") :]
    return len(re.findall(r" (?:fusion|custom-call|copy)\(", entry[: entry.index("\n}")]))


def a_layer(rows: int, packed: int, tokens: int = 0) -> int:
    return launches(3, rows, packed, tokens) - launches(2, rows, packed, tokens)


@pytest.mark.parametrize("rows", [8, 32])
def test_norms_and_rotation_inside_the_decode_kernel_save_launches(rows: int) -> None:
    assert a_layer(rows, packed=1024) <= min(11, a_layer(rows, packed=0) - 2)


def test_a_prompt_step_compiles() -> None:
    assert 0 < a_layer(32, packed=1024, tokens=256) <= 20


@pytest.mark.parametrize("rows", [8, 512, 65536])
@pytest.mark.parametrize("shape", [(128, 2048, 1536), (128, 768, 2048), (8, 14336, 4096)])
def test_experts_are_one_kernel_that_copies_none(rows: int, shape: tuple[int, int, int]) -> None:
    X, depth, out = shape
    x, weight = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((rows, depth), shape))
    sizes = jax.ShapeDtypeStruct((X,), jnp.int32)
    function = jax.jit(partial(gpu.grouped_linear, capability=(9, 0)))
    made = compiled(function, (x, weight, sizes))
    assert "gpu_grouped" in made.as_text() and " while(" not in made.as_text()
    assert made.memory_analysis().temp_size_in_bytes < 1 << 20


@pytest.mark.parametrize("rows", [128, 576, 8448])  # 576: the last tile has half its rows
@pytest.mark.parametrize(("E", "F", "act"), [(4096, 14336, "silu"), (640, 2048, "gelu_tanh")])
def test_gate_and_up_with_their_activation_are_one_kernel(
    rows: int, E: int, F: int, act: str
) -> None:
    x, weight = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((rows, E), (E, 2 * F)))
    function = jax.jit(
        lambda x, w: gpu.gated_linear(x, Linear(w), act, choices=gpu.CHOICES, capability=(9, 0))
    )
    text = compiled(function, (x, weight)).as_text()
    assert text.count(" custom-call(") == 1 and " fusion(" not in text
