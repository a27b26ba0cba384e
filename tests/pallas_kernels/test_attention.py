"""Every implementation of ragged paged attention does what reference.py says."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from octavo.pallas_kernels.attention import blockwise, reference
from octavo.pallas_kernels.attention.cases import Case, extras, inputs

# Both sides accumulate in float32, in another order; one bfloat16 ulp where the output is rounded.
TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2}

ROWS = Case(rows=((0, 1), (15, 1), (16, 1), (127, 1), (3, 0)))
MIXED = Case(
    rows=((40, 1), (0, 0), (7, 1), (0, 0), (0, 0), (100, 1)),
    chunks=((1, 0, 70), (3, 37, 5), (4, 16, 65)),
    chunk_tokens=160,
    chunk_entries=5,
    pages_per_slot=10,
)


def settings(case: Case) -> dict[str, Any]:
    return dict(window=case.window, softcap=case.softcap, scale=case.heads[2] ** -0.5)


def check(case: Case, dtype: str = "float32", seed: int = 0, cache_dtype: str = "") -> None:
    q, k, v, cache, batch = inputs(case, seed, dtype, cache_dtype)
    given: dict[str, Any] = dict(extras(case, seed))
    run = jax.jit(partial(blockwise.attend, **settings(case)))
    want, want_cache = reference.attend(q, k, v, cache, batch, **settings(case), **given)
    got, got_cache = run(q, k, v, cache, batch, **given)
    assert got.dtype == q.dtype
    assert np.isfinite(np.asarray(got, np.float32)).all()  # of padding and idle rows too
    real = np.asarray(batch.real)
    np.testing.assert_allclose(
        np.asarray(got, np.float32)[real], np.asarray(want, np.float32)[real], atol=TOLERANCE[dtype]
    )
    # Page 0 holds whichever padding token came last.
    for ours, theirs in ((got_cache.k, want_cache.k), (got_cache.v, want_cache.v)):
        np.testing.assert_array_equal(np.asarray(ours[1:]), np.asarray(theirs[1:]))


@pytest.mark.parametrize("case", [ROWS, MIXED], ids=["rows", "mixed"])
@pytest.mark.parametrize("heads", [(2, 2, 64), (3, 1, 128), (8, 2, 64), (8, 1, 256)], ids=str)
def test_matches_the_reference_for_every_head_layout(
    case: Case, heads: tuple[int, int, int]
) -> None:
    check(replace(case, heads=heads))


@pytest.mark.parametrize("case", [ROWS, MIXED], ids=["rows", "mixed"])
@pytest.mark.parametrize("window", [1, 5, 16, 64, 1000])
def test_a_query_sees_its_window_and_no_more(case: Case, window: int) -> None:
    check(replace(case, window=window, softcap=20.0))


@pytest.mark.parametrize("case", [ROWS, MIXED], ids=["rows", "mixed"])
def test_matches_the_reference_from_a_bfloat16_cache(case: Case) -> None:
    check(case, "bfloat16")


@pytest.mark.parametrize("kind", reference.BITS)
def test_a_cache_of_bits_is_the_cache_of_their_floats(kind: str) -> None:
    q, k, v, cache, batch = inputs(MIXED, 0, "bfloat16", kind)
    as_bits = partial(jax.lax.bitcast_convert_type, new_dtype=reference.BITS[kind])
    run = jax.jit(partial(blockwise.attend, **settings(MIXED)))
    want, want_cache = run(q, k, v, cache, batch)
    got, got_cache = run(q, k, v, jax.tree.map(as_bits, cache), batch)
    np.testing.assert_array_equal(got, want)
    for ours, theirs in ((got_cache.k, want_cache.k), (got_cache.v, want_cache.v)):
        assert ours.dtype == reference.BITS[kind]
        np.testing.assert_array_equal(ours[1:], as_bits(theirs)[1:])


def test_bits_are_written_without_widening_the_pool() -> None:
    q, k, v, cache, batch = inputs(ROWS, 0, "bfloat16")
    pool = "f32[" + ",".join(map(str, cache.k.shape)) + "]"

    def widened(cache: reference.KV) -> bool:
        run = jax.jit(partial(blockwise.attend, **settings(ROWS)), donate_argnums=3)
        return pool in str(run.lower(q, k, v, cache, batch).compile().as_text())

    assert widened(cache)  # why there are bits: a later jax may need them no more
    as_bits = partial(jax.lax.bitcast_convert_type, new_dtype=jnp.uint16)
    assert not widened(jax.tree.map(as_bits, cache))


@pytest.mark.parametrize("page_size", [1, 4, 32, 128, 256])
def test_any_power_of_two_may_be_the_page_size(page_size: int) -> None:
    check(replace(MIXED, page_size=page_size, pages_per_slot=-(-160 // page_size)))


def test_windows_and_long_rows_span_several_blocks() -> None:
    rows = ((700, 1), (130, 1), (0, 0), (511, 1))
    long = Case(rows, ((2, 300, 200),), pages_per_slot=45, chunk_tokens=256)
    for window in (0, 33, 140):
        check(replace(long, window=window))


def test_rows_of_several_tokens_see_each_other() -> None:
    rows = ((0, 3), (126, 2), (40, 0), (64, 1))
    check(Case(rows, tokens_per_row=3, pages_per_slot=9))
    check(Case(rows, ((2, 3, 20),), tokens_per_row=3, pages_per_slot=9, window=17))


def test_chunks_alone_and_an_empty_step_are_finite() -> None:
    check(Case(rows=((0, 0), (0, 0)), chunks=((1, 0, 16),)))
    check(Case(rows=((0, 0), (9, 0)), chunk_tokens=16, chunk_entries=2))
    check(Case(rows=((0, 0),)))
    check(Case(rows=((9, 0),), window=4))


@pytest.mark.parametrize("kind", ["", "bfloat16", "int8", "float8_e4m3fn"])
@pytest.mark.parametrize("case", [ROWS, MIXED], ids=["rows", "mixed"])
def test_scales_and_sinks_mean_what_the_reference_says(case: Case, kind: str) -> None:
    check(replace(case, scaled=True, sinks=True, softcap=20.0, window=40), cache_dtype=kind)


def test_a_sink_as_heavy_as_all_keys_halves_what_is_attended_to() -> None:
    case = replace(MIXED, window=7)
    given = inputs(case)
    plain, _ = reference.attend(*given, **settings(case))
    none, _ = reference.attend(*given, **settings(case), sinks=jnp.full(4, -1e9))
    np.testing.assert_allclose(none, plain, atol=1e-6)
    q = jnp.zeros_like(given[0])  # every key weighs 1
    position = given[-1].position
    plain, _ = reference.attend(q, *given[1:], **settings(case))
    half, _ = reference.attend(q, *given[1:], **settings(case), sinks=jnp.full(4, jnp.log(7.0)))
    whole = np.asarray(given[-1].real & (position >= 6))
    np.testing.assert_allclose(2 * half[whole], plain[whole], atol=1e-6)


@pytest.mark.parametrize("kind, most", [("int8", 127), ("float8_e4m3fn", 448)])
def test_8_bits_saturate(kind: str, most: float) -> None:
    x = jnp.asarray([[[1000.0]], [[-1000.0]], [[3.0]]])
    kept = reference.stored(x, None, kind).astype(jnp.float32)[:, 0, 0]
    assert kept.tolist() == [most, -most, 3.0]
    scaled = reference.stored(x, jnp.asarray([10.0]), kind).astype(jnp.float32)[:, 0, 0]
    np.testing.assert_allclose(scaled, [100, -100, 0.3], atol=4)


def random_case(rng: np.random.Generator) -> Case:
    rows, chunks = [], []
    for slot in range(int(rng.integers(1, 7))):
        start, kind = int(rng.integers(0, 120)), rng.integers(0, 3)
        rows.append((start, 1) if kind == 0 else (0, 0))
        if kind == 1:
            chunks.append((slot, start, int(rng.integers(1, 100))))
    rng.shuffle(chunks)
    return Case(
        rows=tuple(rows),
        chunks=tuple(chunks),
        pages_per_slot=14,
        chunk_tokens=int(rng.integers(0, 2)) * 64,
        chunk_entries=int(rng.integers(1, 4)),
        window=int(rng.choice([0, 0, 3, 40, 130])),
        softcap=float(rng.choice([0.0, 30.0])),
        heads=(4, 2, 16),
    )


@pytest.mark.parametrize("seed", range(12))
def test_any_ragged_mix_matches_the_reference(seed: int) -> None:
    check(random_case(np.random.default_rng(seed)), seed=seed)


@pytest.mark.parametrize("case", [Case(rows=((5, 1),)), ROWS, MIXED], ids=["one", "rows", "mixed"])
def test_the_cache_is_written_in_place(case: Case) -> None:
    q, k, v, cache, batch = inputs(replace(case, pages_per_slot=1000 // len(case.rows)))

    def step(q: Any, k: Any, v: Any, caches: Any, batch: Any) -> Any:
        after = []
        for one in caches:  # each layer reads what the one before it gave
            q, one = blockwise.attend(q, k, v, one, batch, **settings(case))
            after.append(one)
        return q, after

    caches = [cache, jax.tree.map(jnp.copy, cache)]
    compiled = jax.jit(step, donate_argnums=3).lower(q, k, v, caches, batch).compile()
    memory, pool = compiled.memory_analysis(), cache.k.nbytes
    assert memory is not None
    assert memory.alias_size_in_bytes >= 4 * pool
    assert memory.temp_size_in_bytes < pool  # no copy of a pool anywhere
