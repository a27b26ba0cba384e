"""Attention by whole pages is what reference.py says, for decode rows and for one prompt."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from octavo.backends.neuron import ops
from octavo.pallas_kernels.attention import reference
from octavo.pallas_kernels.attention.batch import RaggedBatch
from octavo.pallas_kernels.attention.cases import Case, extras, inputs

ROWS = Case(rows=((0, 1), (15, 1), (16, 1), (127, 1), (3, 0)))
IDLE = ((40, 0), (0, 0), (7, 0))
PROMPT = Case(rows=IDLE, chunks=((2, 37, 70),), chunk_tokens=96)


def flat(cache: reference.KV) -> ops.FlatKV:
    """The same tokens, one a row."""
    P, K, S, D = cache.k.shape
    k, v = (pool.swapaxes(1, 2).reshape(P * S, K * D) for pool in (cache.k, cache.v))
    return ops.FlatKV(k=k, v=v)


def without_rows(batch: RaggedBatch) -> RaggedBatch:
    """A step that only runs prompts: its tables stay, its rows go."""
    R = batch.row_start.shape[0]
    tokens = {name: getattr(batch, name)[R:] for name in ("dest", "position", "slot", "real")}
    return replace(batch, row_start=batch.row_start[:0], row_count=batch.row_count[:0], **tokens)


@pytest.mark.parametrize(
    "case, heads, window, softcap, sinks",
    [
        (ROWS, (2, 2, 8), 0, 0.0, False),
        (ROWS, (6, 2, 16), 20, 5.0, True),
        (PROMPT, (6, 2, 16), 0, 0.0, False),
        (PROMPT, (2, 2, 8), 20, 5.0, True),
    ],
    ids=["rows", "rows with all", "prompt", "prompt with all"],
)
def test_matches_the_reference(
    case: Case, heads: tuple[int, int, int], window: int, softcap: float, sinks: bool
) -> None:
    case = replace(case, heads=heads, sinks=sinks)
    q, k, v, cache, batch = inputs(case)
    static: dict[str, Any] = {"window": window, "softcap": softcap, "scale": heads[2] ** -0.5}
    static |= extras(case)
    want, want_cache = reference.attend(q, k, v, cache, batch, **static)
    if case.chunks:
        R = len(case.rows)
        q, k, v, want, batch = q[R:], k[R:], v[R:], want[R:], without_rows(batch)
    got, got_cache = jax.jit(lambda *a: ops.attend(*a, **static))(q, k, v, flat(cache), batch)
    assert np.isfinite(np.asarray(got)).all()  # of padding and idle rows too
    real = np.asarray(batch.real)
    np.testing.assert_allclose(np.asarray(got)[real], np.asarray(want)[real], atol=2e-5)
    size = batch.page_size  # page 0 holds whichever padding token came last
    theirs = flat(want_cache)
    for ours, other in ((got_cache.k, theirs.k), (got_cache.v, theirs.v)):
        np.testing.assert_array_equal(np.asarray(ours[size:]), np.asarray(other[size:]))


def test_a_context_cut_to_what_is_held_changes_nothing() -> None:
    q, k, v, cache, batch = inputs(replace(ROWS, rows=((0, 1), (15, 1), (30, 1))))
    static: dict[str, Any] = {"window": 0, "softcap": 0.0, "scale": 0.125}
    want, _ = ops.attend(q, k, v, flat(cache), batch, **static)
    got, _ = ops.attend(q, k, v, flat(cache), replace(batch, table=batch.table[:, :2]), **static)
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_grouped_linear_gives_every_row_its_own_expert() -> None:
    rng = np.random.default_rng(0)
    x, weight = (jnp.asarray(rng.normal(size=s), "float32") for s in ((7, 4), (3, 4, 5)))
    got = ops.grouped_linear(x, weight, jnp.asarray([2, 0, 4], jnp.int32))
    own = [0, 0, 2, 2, 2, 2]
    np.testing.assert_allclose(got[:6], [x[i] @ weight[e] for i, e in enumerate(own)], atol=1e-5)
