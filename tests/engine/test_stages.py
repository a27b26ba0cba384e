"""Micro-batches of a step: attended one after another, they are the step."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from octavo.engine.stages import Micro, cut, joined, micro_batches, silenced
from octavo.models.config import ModelConfig, ModelConfigError
from octavo.models.registry import build
from octavo.models.shards import Shards
from octavo.pallas_kernels.attention.batch import RaggedBatch
from octavo.pallas_kernels.attention.cases import Case, inputs
from octavo.pallas_kernels.attention.reference import KV, attend
from tests.engine.tiny import GEMMA3, LLAMA

STATIC: dict[str, Any] = {"window": 0, "scale": 0.125, "softcap": 0.0}
CASES = {
    "rows": Case(rows=((37, 1), (5, 1), (0, 0), (64, 1), (17, 1))),
    "rows and chunks": Case(
        rows=((37, 1), (0, 0), (0, 0), (64, 1), (17, 1)),
        chunks=((1, 0, 21), (2, 16, 9)),
        chunk_tokens=37,
    ),
    "one row and a chunk": Case(rows=((37, 1), (0, 0)), chunks=((1, 0, 5),)),
}


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("name", CASES)
def test_micro_batches_attend_as_the_whole_step_does(name: str, count: int) -> None:
    q, k, v, cache, batch = inputs(CASES[name])
    want, whole = attend(q, k, v, cache, batch, **STATIC)
    rows = batch.row_start.shape[0]
    token = jnp.arange(q.shape[0], dtype=jnp.int32)  # which of the step's tokens it is
    done = []
    for part in cut(token, (batch,), count):
        own = part.batches[0]
        at = part.token
        y, cache = attend(q[at], k[at], v[at], cache, own, **STATIC)
        done.append(y.reshape(len(at), -1))
    got = joined(jnp.stack(done), rows, q.shape[0] - rows).reshape(want.shape)
    real = np.asarray(batch.real)
    np.testing.assert_allclose(got[real], want[real], atol=1e-5)
    _same_pages(cache, whole)


def _same_pages(cache: KV, want: KV) -> None:
    """But for the trash page."""
    np.testing.assert_array_equal(cache.k[1:], want.k[1:])
    np.testing.assert_array_equal(cache.v[1:], want.v[1:])


def test_a_stage_without_a_micro_batch_writes_to_the_trash_page_alone() -> None:
    q, k, v, cache, batch = inputs(CASES["rows and chunks"])
    y, after = attend(q, k, v, cache, silenced(batch, jnp.bool_(False)), **STATIC)
    assert np.isfinite(np.asarray(y)).all()
    _same_pages(after, cache)
    own = silenced(batch, jnp.bool_(True))
    jax.tree.map(np.testing.assert_array_equal, own, batch)


def test_micro_batches_have_one_shape_and_every_token_once() -> None:
    batch = _batch("rows and chunks")
    token = jnp.arange(batch.dest.shape[0], dtype=jnp.int32)
    parts = cut(token, (batch,), 3)
    shapes = [jax.tree.map(jnp.shape, part) for part in parts]
    assert shapes == [shapes[0]] * 3
    assert sorted(_real(parts)) == list(np.asarray(token)[np.asarray(batch.real)])


def _batch(name: str) -> RaggedBatch:
    return inputs(CASES[name])[-1]


def _real(parts: list[Micro]) -> list[int]:
    return [int(t) for p in parts for t in np.asarray(p.token)[np.asarray(p.batches[0].real)]]


def test_a_step_of_few_tokens_is_one_micro_batch() -> None:
    assert micro_batches(2, 64, 0) == micro_batches(2, 511, 0) == 1
    assert micro_batches(2, 512, 0) == 2
    assert micro_batches(2, 64, 2048) == 8
    assert micro_batches(2, 64, 8192) == 8
    assert micro_batches(2, 1024, 2048) == 2, "each carries all rows"


def test_layers_are_cut_into_stages_that_are_alike() -> None:
    deep = ModelConfig.from_hf(GEMMA3 | {"num_hidden_layers": 12})
    for stacked in (False, True):
        model = build(deep, 64, Shards(stage=2), stacked=stacked)
        assert len(model.layer_specs) == 6
        whole, local = model.sizes["L"], model.local_sizes["L"]
        assert (whole, local) == ((4, 2) if stacked else (2, 1))
    with pytest.raises(ModelConfigError, match="12 layers, which repeat every 3, .* fit: 2, 4$"):
        build(deep, 64, Shards(stage=3))
    uneven = ModelConfig.from_hf(GEMMA3 | {"num_hidden_layers": 8})
    with pytest.raises(ModelConfigError, match="cannot be cut into 2 stages alike; .* fit: none"):
        build(uneven, 64, Shards(stage=2))
    one = ModelConfig.from_hf(LLAMA)
    assert len(build(one, 64, Shards(stage=2)).layer_specs) == 1
