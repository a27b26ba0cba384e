"""Stages of a backend that runs its layers in a loop. As on_eight_devices.py, and run with it.

By hand, with the engine too: OCTAVO_MESH_FULL=1 JAX_NUM_CPU_DEVICES=8 pytest THIS FILE
"""

import os
from dataclasses import replace
from typing import Any

import flax.struct
import jax
import numpy as np
import pytest

from octavo.backends import plain, tpu
from octavo.backends.record import Backend
from octavo.engine import stages
from octavo.engine.mesh import Placement, make_mesh, shards_of
from octavo.models.config import ModelConfig
from octavo.models.load import random_params
from octavo.models.registry import build
from octavo.pallas_kernels.attention import KV, blockwise, init_kv
from tests.engine.tiny import GEMMA3, LLAMA, Client, make_engine, make_parts, prompt

DEEP = LLAMA | {"num_hidden_layers": 4}


def test_each_stage_has_the_stack_of_its_own_layers() -> None:
    config, sizes = ModelConfig.from_hf(DEEP), {"stage": 2, "model": 2}
    alone = random_params(build(config, 64, stacked=True))
    model = build(config, 64, shards_of(sizes), stacked=True)
    place = Placement(make_mesh(sizes, jax.devices()), model)
    cut = random_params(model, put=place.put_weight)
    for one, other in zip(jax.tree.leaves(alone.layers), jax.tree.leaves(cut.layers), strict=True):
        assert {s.data.shape[0] for s in other.addressable_shards} == {2}
        assert [s.index[0].start or 0 for s in other.addressable_shards] == [0, 0, 2, 2]
        if one.ndim == 2:  # norms; matrices are laid out by each device for itself
            np.testing.assert_array_equal(one, other)


@flax.struct.dataclass
class StackedKV:
    """A fake of the TPU's cache: plain pages of all layers of a group."""

    kv: KV  # arrays [L, P, K, S, D]
    layer: Any = None

    def at(self, layer: Any) -> "StackedKV":
        return StackedKV(self.kv, layer)


def looped(cpu: Backend) -> Backend:
    """A CPU whose layers run in the TPU's loop."""

    def init_cache(
        layers: Any, pages: Any, page_size: int, kv_heads: int, head_size: int, dtype: Any
    ) -> tuple[StackedKV, ...]:
        counts = [sum(layer.group == g for layer in layers) for g in range(len(pages))]
        return tuple(
            StackedKV(
                jax.tree.map(
                    lambda a, n=n: jax.numpy.stack([a] * n),
                    init_kv(count, page_size, kv_heads, head_size, dtype),
                )
            )
            for count, n in zip(pages, counts, strict=True)
        )

    def attend(q: Any, k: Any, v: Any, cache: Any, batch: Any, **static: Any) -> Any:
        own = jax.tree.map(lambda a: a[cache.layer], cache.kv)
        y, own = blockwise.attend(q, k, v, own, batch, **static)
        kv = jax.tree.map(lambda a, b: a.at[cache.layer].set(b), cache.kv, own)
        return y, StackedKV(kv, cache.layer)

    assert cpu.linear is plain.linear
    return replace(
        cpu,
        attend=attend,
        init_cache=init_cache,
        layers=tpu.layers,
        stacked=True,
        whole_steps=True,
    )


@pytest.mark.skipif(not os.environ.get("OCTAVO_MESH_FULL"), reason="half a minute an engine")
@pytest.mark.parametrize("facts", [DEEP, GEMMA3 | {"num_hidden_layers": 6}], ids=["llama", "gemma"])
def test_a_loop_over_the_layers_of_a_stage_gives_the_text_of_one_device(
    facts: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "LEAST", 1)
    settings: dict[str, Any] = {
        "max_num_seqs": 2,
        "max_num_batched_tokens": 32,
        "max_model_len": 96,
        "page_size": 16,
        "num_pages": 14,
        "max_logprobs": 1,
    }
    asked = [prompt(37), prompt(37)[:32] + prompt(3), prompt(5)]

    def texts(mesh: str) -> list[list[int]]:
        core = make_engine(make_parts(facts, backend=looped, mesh=mesh, **settings))
        client = Client(core)
        handles = [client.add(tokens, max_tokens=16, ignore_eos=True) for tokens in asked]
        client.drain()
        core.close()
        return [client.tokens[handle] for handle in handles]

    assert texts("stage=2") == texts("")
