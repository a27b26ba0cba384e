"""Sampling does what a straightforward numpy implementation with sorting does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from octavo.pallas_kernels.sampling import (
    NS,
    OFF,
    Controls,
    Edits,
    count_generated,
    mark_prompt,
    noise,
    penalties,
    sample,
    top_logprobs,
)
from octavo.pallas_kernels.sampling.sample import argmax
from octavo.pallas_kernels.sampling.thresholds import threshold

V = 300


def seeds(rows: int, seed: int = 0) -> jax.Array:
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.integers(0, 2**32, (rows, 2)), jnp.uint32)


def controls(rows: int, **settings: float) -> Controls:
    return Controls.unpack(jnp.asarray(np.tile(Controls.pack(**settings), (rows, 1))))  # type: ignore[arg-type]


def sorted_keep(x: np.ndarray, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """What one row keeps, by sorting; equal logits share a fate."""
    x = x.astype(np.float64)
    keep = np.exp(x - x.max()) >= min_p
    if 0 < top_k < len(x):
        keep &= x >= np.sort(np.where(keep, x, -np.inf))[-top_k]
    p = np.where(keep, np.exp(x - x.max()), 0)
    p /= p.sum()
    above = np.array([p[x > value].sum() for value in x])
    return keep & (above < top_p) if top_p < 1 else keep


LOGITS = {
    "spread": np.random.default_rng(0).normal(size=V) * 4,
    "flat": np.zeros(V),
    "ties": np.random.default_rng(1).integers(-3, 4, V) * 1.0,
    "tiny": np.random.default_rng(2).normal(size=V) * 1e-6,
    "huge": np.random.default_rng(3).normal(size=V) * 1e4,
    "forbidden": np.where(np.arange(V) % 50 == 0, np.linspace(-2, 2, V), -np.inf),
    "zeros": np.where(np.arange(V) % 2, 0.0, -0.0) - (np.arange(V) % 3 == 0),
}


@pytest.mark.parametrize("name", LOGITS)
def test_keeps_exactly_what_sorting_keeps(name: str) -> None:
    settings = [
        (k, p, m)
        for k in (0, -1, 1, 2, 7, 40, V - 1, V, V + 9)
        for p in (1.0, 0.937, 0.31, 1e-6)
        for m in (0.0, 0.05, 1.0)
    ]
    k, p, m = (np.array(column) for column in zip(*settings, strict=True))
    x = jnp.asarray(np.tile(LOGITS[name], (len(settings), 1)), jnp.float32)
    lowest = jax.jit(threshold)(
        x, jnp.asarray(k, jnp.int32), jnp.asarray(p, jnp.float32), jnp.asarray(m, jnp.float32)
    )
    keep = np.asarray(x >= lowest[:, None])
    for row, setting in enumerate(settings):
        want = sorted_keep(np.asarray(x[row]), *setting)
        # A sum of probabilities that lies on top_p to the last digits may fall either way.
        assert (keep[row] != want).sum() <= (1 if setting[1] < 1 else 0), (name, setting)


def test_thresholds_are_off_by_their_own_names() -> None:
    x = jnp.asarray(LOGITS["spread"], jnp.float32)[None]
    off = Controls.unpack(jnp.asarray([OFF], jnp.float32))
    assert threshold(x, off.top_k, off.top_p, off.min_p)[0] == -jnp.inf


def test_greedy_rows_take_the_first_of_the_likeliest_whatever_the_others_do() -> None:
    x = np.random.default_rng(0).normal(size=(4, V)).astype(np.float32)
    x[1, [7, 90]] = 99
    packed = np.stack([Controls.pack(temperature=t) for t in (0, 0, 1.5, 0)])
    tokens, _ = jax.jit(sample)(x, Controls.unpack(jnp.asarray(packed)), seeds(4), jnp.arange(4))
    assert [tokens[0], tokens[1], tokens[3]] == [x[0].argmax(), 7, x[3].argmax()]


def test_argmax_of_rows_without_a_largest_stays_in_bounds() -> None:
    x = jnp.stack([jnp.full(V, jnp.nan), jnp.full(V, -jnp.inf), jnp.zeros(V)])
    assert argmax(x).tolist() == [V - 1, 0, 0]


def test_draws_follow_the_softmax_at_their_temperature() -> None:
    rows, temperature = 20_000, 0.7
    x = np.log(np.array([0.5, 0.2, 0.2, 0.1], np.float32))
    tokens, _ = jax.jit(sample)(
        jnp.tile(x, (rows, 1)),
        controls(rows, temperature=temperature),
        jnp.tile(seeds(1), (rows, 1)),
        jnp.arange(rows),
    )
    p = np.exp(x / temperature)
    p /= p.sum()
    seen = np.bincount(tokens, minlength=4)
    chi_square = ((seen - rows * p) ** 2 / (rows * p)).sum()
    assert chi_square < 16.3  # 3 degrees of freedom, p = 0.001


def test_draws_stay_inside_what_the_controls_keep() -> None:
    rows = 400
    x = np.random.default_rng(5).normal(size=V).astype(np.float32) * 3
    settings = dict(temperature=1.3, top_k=9, top_p=0.8, min_p=0.05)
    run = jax.jit(sample)
    tokens, _ = run(
        jnp.tile(x, (rows, 1)), controls(rows, **settings), seeds(rows), jnp.arange(rows)
    )
    keep = np.flatnonzero(sorted_keep(x / 1.3, 9, 0.8, 0.05))
    assert set(np.asarray(tokens).tolist()) == set(keep.tolist())


def test_a_draw_depends_on_its_request_and_not_on_its_row() -> None:
    x = np.random.default_rng(6).normal(size=(8, V)).astype(np.float32)
    seed, position = seeds(8), jnp.arange(8) * 5
    alone = sample(jnp.asarray(x[3:4]), controls(1), seed[3:4], position[3:4])[0]
    order = np.array([5, 3, 1, 0, 2, 4, 6, 7])
    beside = sample(jnp.asarray(x[order]), controls(8), seed[order], position[order])[0]
    assert alone[0] == beside[1]


def test_noise_is_the_same_number_wherever_it_is_computed() -> None:
    """These bits are a promise: seeds must give the same text on every backend and release."""
    seed = jnp.asarray([[1, 2]], jnp.uint32)
    zero = jnp.zeros(1, jnp.int32)
    ids = jnp.arange(V)
    whole = noise.bits(seed, zero, zero + 7, ids)
    shard = noise.bits(seed, zero, zero + 7, ids[100:200])
    np.testing.assert_array_equal(whole[:, 100:200], shard)
    first = [python_bits(1, 2, 0, 7, vocabulary) for vocabulary in range(3)]
    assert [int(b) for b in whole[0, :3]] == first
    assert first[0] == 0x59075C99


def python_bits(*stream_and_id: int) -> int:
    """The hash in whole numbers of any size."""
    *parts, vocabulary = stream_and_id
    low = 0xFFFFFFFF

    def mix(x: int) -> int:
        x = (x ^ x >> 16) * 0x85EBCA6B & low
        x = (x ^ x >> 13) * 0xC2B2AE35 & low
        return x ^ x >> 16

    keys = []
    for salt in (0x9E3779B9, 0x7F4A7C15):
        state = salt
        for part in parts:
            state = mix(state ^ part) + salt & low
        keys.append(mix(state))
    return mix(mix(vocabulary + keys[0] & low) ^ keys[1])


def chi_square_of_bytes(values: np.ndarray) -> float:
    seen = np.bincount(values.ravel(), minlength=256)
    expected = values.size / 256
    return float(((seen - expected) ** 2 / expected).sum())


# 255 degrees of freedom: p = 0.0001 lies at 346, on either side of 255 about as far.
@pytest.mark.parametrize("shift", [0, 8, 16, 24])
def test_every_byte_of_the_noise_is_uniform(shift: int) -> None:
    rows = 64
    hashed = np.asarray(
        noise.bits(seeds(rows), jnp.zeros(rows, jnp.int32), jnp.arange(rows), jnp.arange(1000))
    )
    assert 170 < chi_square_of_bytes((hashed >> shift) & 255) < 346


@pytest.mark.parametrize("which", ["position", "choice", "seed low", "seed high", "vocabulary"])
def test_neighbours_share_no_noise(which: str) -> None:
    """The exclusive or of two streams, one step apart in one argument, is uniform too."""
    rows = 64
    base = jnp.arange(rows, dtype=jnp.int32) * 2
    seed, zero = jnp.tile(seeds(1), (rows, 1)), jnp.zeros(rows, jnp.int32)
    ids = jnp.arange(1000)
    one = [seed, zero, base, ids]
    two = list(one)
    if which == "position":
        two[2] = base + 1
    elif which == "choice":
        two[1] = zero + 1
    elif which == "vocabulary":
        two[3] = ids + 1
    else:
        two[0] = seed.at[:, int(which == "seed high")].add(1)
    both = np.asarray(noise.bits(*one) ^ noise.bits(*two))
    for shift in (0, 24):
        assert 170 < chi_square_of_bytes((both >> shift) & 255) < 346
    g1, g2 = (np.asarray(noise.gumbel(*a)).ravel() for a in (one, two))
    # 64,000 pairs: the correlation of independent numbers has a deviation of 0.004.
    assert abs(np.corrcoef(g1, g2)[0, 1]) < 0.016


def test_gumbel_noise_has_its_mean_and_variance_and_is_finite() -> None:
    rows = 100
    zero = jnp.zeros(rows, jnp.int32)
    g = np.asarray(noise.gumbel(seeds(rows), zero, jnp.arange(rows), jnp.arange(2000)))
    assert np.isfinite(g).all()
    assert abs(g.mean() - 0.5772) < 0.012  # 4 deviations of 1.28 / sqrt(200,000)
    assert abs(g.var() - np.pi**2 / 6) < 0.04


def test_penalties_follow_their_formulas() -> None:
    x = np.array([[2.0, -2.0, 2.0, -2.0, 1.0]], np.float32)
    prompt = penalties.IN_PROMPT
    counts = jnp.asarray([[prompt, prompt, 3, prompt + 2, 0]], jnp.float32)
    c = controls(1, repetition=2.0, frequency=0.5, presence=0.25)
    got = penalties.edit(jnp.asarray(x), c, Edits(counts=counts))
    np.testing.assert_allclose(got[0], [1.0, -4.0, 1.0 - 1.5 - 0.25, -4.0 - 1.0 - 0.25, 1.0])


def test_counts_remember_prompt_and_output_apart() -> None:
    counts = jnp.zeros((3, 10), jnp.float32)
    slot, token = jnp.asarray([1, 1, 2, 0, 0]), jnp.asarray([4, 4, 9, 0, 0])
    real = jnp.asarray([True, True, True, False, False])
    counts = mark_prompt(counts, slot, token, real)
    for _ in range(2):
        now = jnp.asarray([3, 4, 5])
        counts = count_generated(counts, now, jnp.asarray([True, True, False]))
    want = np.zeros((3, 10), np.float32)
    want[0, 3], want[1, 4], want[2, 9] = 2, penalties.IN_PROMPT + 2, penalties.IN_PROMPT
    np.testing.assert_array_equal(counts, want)


def test_a_count_stops_before_a_half_is_lost() -> None:
    counts = jnp.full((1, 2), penalties.MOST + penalties.IN_PROMPT, jnp.float32)
    after = count_generated(counts, jnp.asarray([1]), jnp.asarray([True]))
    np.testing.assert_array_equal(after, counts)


def test_forbidden_ids_are_never_drawn_and_unused_entries_change_nothing() -> None:
    x = jnp.zeros((2, 40))
    allowed = np.zeros((2, 2), np.uint32)
    allowed[0] = [0b1110, 0]
    allowed[1] = [0xFFFFFFFF, 0xFFFFFFFF]
    edits = Edits(
        allowed=jnp.asarray(allowed),
        bad_words=jnp.asarray([[[-1, 1], [-1, -1]], [[5, 2], [6, 3]]]),
        recent=jnp.asarray([[4], [5]]),
        stop_ids=jnp.asarray([[3, -1], [0, -1]]),
        below_min=jnp.asarray([True, False]),
        bias_ids=jnp.asarray([[0, 0], [7, 8]]),
        bias=jnp.asarray([[0.0, 0.0], [2.5, -jnp.inf]]),
    )
    got = np.asarray(jax.jit(penalties.edit)(x, controls(2), edits))
    assert np.flatnonzero(got[0] == 0).tolist() == [2]
    assert np.flatnonzero(np.isinf(got[1])).tolist() == [2, 8]
    assert got[1, 7] == 2.5 and (np.delete(got[1], [2, 7, 8]) == 0).all()


def test_nothing_changes_while_no_row_asks_for_it() -> None:
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 40)), jnp.float32)
    unused = jnp.full((2, 3), -1)
    edits = Edits(
        bad_words=jnp.full((2, 2, 2), -1),
        recent=jnp.full((2, 1), -1),
        stop_ids=unused,
        below_min=jnp.asarray([True, True]),
        bias_ids=unused,
        bias=jnp.zeros((2, 3)),
        counts=jnp.full((2, 40), 3, jnp.float32),
    )
    np.testing.assert_array_equal(penalties.edit(x, controls(2), edits), x)


def test_log_probabilities_are_those_of_the_logits_as_they_came() -> None:
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, V)) * 2, jnp.float32)
    c = controls(3, temperature=0.5, repetition=1.5, top_k=5)
    counts = jnp.ones((3, V), jnp.float32)
    tokens, got = sample(x, c, seeds(3), jnp.arange(3), Edits(counts=counts), logprobs=True)
    want = np.asarray(jax.nn.log_softmax(x))
    np.testing.assert_allclose(got, want[np.arange(3), tokens], atol=1e-5)
    ids, values, chosen, rank = top_logprobs(x, tokens, 4)
    np.testing.assert_array_equal(ids, np.argsort(-want)[:, :4])
    np.testing.assert_allclose(values, -np.sort(-want)[:, :4], atol=1e-5)
    np.testing.assert_allclose(chosen, got, atol=1e-5)
    for row in range(3):
        assert np.argsort(-want[row])[rank[row] - 1] == tokens[row]
    assert [a.shape for a in top_logprobs(x, tokens, 0)] == [(3, 0), (3, 0), (3,), (3,)]


def test_packing_loses_nothing() -> None:
    packed = Controls.pack(0.5, 0.25, 0.125, 1.5, -0.5, 0.75, 1 << 20, 7)
    assert packed.shape == (NS,) and packed.dtype == np.float32 and len(OFF) == NS
    c = Controls.unpack(jnp.asarray(packed)[None])
    assert (int(c.top_k[0]), int(c.choice[0])) == (1 << 20, 7)
    assert (float(c.top_p[0]), float(c.presence[0])) == (0.25, -0.5)
    assert Controls.pack(top_k=-1)[6] == 0
