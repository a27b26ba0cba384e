"""Attention inside rows: beside each text's own attention, computed alone in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from octavo.pallas_kernels.attention import packed

LENGTHS = ((5, 8, 1), (16,), (3, 3))  # of the texts in each row
WIDTH = 16
TOLERANCE = 2e-6  # values of size 1, float32


def alone(q, k, v, causal, window, scale, softcap):
    """q [n, H, D], k and v [n, K, D] of one text -> [n, H, D] in float64."""
    n, H, _ = q.shape
    k, v = (np.repeat(x, H // k.shape[1], axis=1) for x in (k, v))
    logits = np.einsum("qhd,khd->hqk", q, k) * scale
    if softcap:
        logits = softcap * np.tanh(logits / softcap)
    behind = np.arange(n)[:, None] - np.arange(n)
    seen = (behind >= 0) | (not causal)
    if window:
        seen &= behind < window
    weight = np.exp(np.where(seen, logits, -np.inf))
    return np.einsum("hqk,khd->qhd", weight / weight.sum(-1, keepdims=True), v)


@pytest.mark.parametrize("blocks", [False, True], ids=["at once", "by blocks"])
@pytest.mark.parametrize(
    ("causal", "window", "softcap"),
    [(False, 0, 0.0), (True, 0, 0.0), (True, 4, 0.0), (True, 0, 5.0)],
)
def test_texts_see_themselves_and_nothing_else(causal, window, softcap, blocks, monkeypatch):
    if blocks:
        monkeypatch.setattr(packed, "MOST_LOGITS", 4 * 4 * len(LENGTHS) * WIDTH)
    rng = np.random.default_rng(0)
    N, H, K, D = len(LENGTHS) * WIDTH, 4, 2, 8
    q, k, v = (rng.standard_normal((N, heads, D)).astype(np.float32) for heads in (H, K, K))
    segment = np.zeros((len(LENGTHS), WIDTH), np.int32)
    places, number = [], 0
    for row, lengths in enumerate(LENGTHS):
        at = 0
        for length in lengths:
            number += 1
            segment[row, at : at + length] = number
            places.append(slice(row * WIDTH + at, row * WIDTH + at + length))
            at += length
    got = packed.attend(
        *(jnp.asarray(x) for x in (q, k, v, segment)),
        causal=causal,
        window=window,
        scale=0.3,
        softcap=softcap,
    )
    assert bool(jnp.isfinite(got).all())  # padding too
    for place in places:
        one, keys, values = (x[place].astype(np.float64) for x in (q, k, v))
        want = alone(one, keys, values, causal, window, 0.3, softcap)
        np.testing.assert_allclose(got[place], want, atol=TOLERANCE)
