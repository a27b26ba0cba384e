"""The record of TPUs, without one: what it refuses, and the bytes its cache takes."""

from dataclasses import replace

import jax
import pytest

from octavo.backends import tpu
from octavo.engine.config import EngineConfig
from octavo.models.ops import LayerSpec
from octavo.pallas_kernels.attention.tpu import page_bytes


@pytest.mark.parametrize(
    "change, hint",
    [
        ({"dtype": "float16"}, "use bfloat16"),
        ({"kv_cache_dtype": "float16"}, "use bfloat16"),
        ({"page_size": 8}, "at least 16 tokens.*page_size=8"),
    ],
    ids=str,
)
def test_what_a_tpu_cannot_serve_is_refused_with_the_next_step(change: dict, hint: str) -> None:
    assert tpu.why_not(EngineConfig()) is None
    assert tpu.why_not(replace(EngineConfig(), page_size=16)) is None
    refusal = tpu.why_not(replace(EngineConfig(), **change))
    assert refusal is not None
    with pytest.raises(ValueError, match=hint):
        raise ValueError(refusal)


def test_the_cache_takes_the_bytes_that_were_predicted() -> None:
    specs = (LayerSpec(group=0), LayerSpec(group=1, window=8), LayerSpec(group=1, window=8))
    cache = tpu.init_cache(specs, (10, 4), 32, 2, 64, "bfloat16")
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
    per_group = [page_bytes(n, 32, 2, 64, "bfloat16") for n in (1, 2)]
    assert held == 10 * per_group[0] + 4 * per_group[1]
