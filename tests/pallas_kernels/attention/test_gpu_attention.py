"""The NVIDIA kernels against the definition, interpreted; and that they lower for CUDA, here."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from octavo.pallas_kernels.attention import cases, gpu, gpu_decode, reference
from octavo.pallas_kernels.attention.cases import Case
from octavo.pallas_kernels.attention.gpu_decode import DecodeTuning, decode, plan_decode
from octavo.pallas_kernels.attention.gpu_hopper import longest_first
from octavo.pallas_kernels.attention.gpu_prefill import (
    PREFILL,
    PrefillTuning,
    plan_prefill,
    prefill,
    prefill_tuning,
)
from octavo.pallas_kernels.mosaic import writes_through_references

# float32: sums of up to 128 terms in another order. bfloat16: probabilities are rounded to 8 bits
# before they meet the values, and the result is rounded once more.
TOLERANCE = {"float32": 2e-6, "bfloat16": 6e-3}

ROWS = ((0, 1), (5, 1), (0, 0), (100, 1), (37, 1))
CHUNKS = ((0, 0, 33), (2, 70, 21), (4, 5, 1))
IDLE = ((0, 0),) * 5
MIXED = ((0, 0), (63, 1), (0, 0), (100, 1), (0, 0))

CASES = {
    "decode": Case(rows=ROWS),
    "decode window": Case(rows=ROWS, window=20, heads=(9, 3, 64)),
    "decode softcap": Case(rows=ROWS, softcap=5.0, heads=(4, 1, 128)),
    "chunks": Case(rows=IDLE, chunks=CHUNKS, chunk_tokens=80, chunk_entries=5),
    "chunks window": Case(rows=IDLE, chunks=CHUNKS, window=20, heads=(9, 3, 64), softcap=5.0),
    "chunks large pages": Case(rows=IDLE, chunks=CHUNKS, page_size=64, pages_per_slot=2),
    "mixed": Case(rows=MIXED, chunks=CHUNKS, chunk_tokens=64, heads=(8, 2, 64)),
}


def run(
    case: Case, dtype: str, attend: Callable[..., Any], cache_dtype: str = ""
) -> tuple[Any, ...]:
    """attend's result and the definition's, with garbage where no token was ever written."""
    q, k, v, cache, batch = cases.inputs(case, dtype=dtype, cache_dtype=cache_dtype)
    static: dict[str, Any] = dict(
        window=case.window, scale=q.shape[-1] ** -0.5, softcap=case.softcap, **cases.extras(case)
    )
    got, pages = attend(q, k, v, cache, batch, **static)
    want, pages_wanted = reference.attend(q, k, v, cache, batch, **static)
    return batch, got, want, pages, pages_wanted


def relative_error(got: jax.Array, want: jax.Array) -> float:
    got, want = got.astype(jnp.float32), want.astype(jnp.float32)
    return float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_matches_the_definition(name: str, dtype: str) -> None:
    interpreted = functools.partial(gpu.attend, interpret=True)
    batch, got, want, pages, pages_wanted = run(CASES[name], dtype, interpreted)
    assert relative_error(got[batch.real], want[batch.real]) < TOLERANCE[dtype]
    assert jnp.array_equal(pages.k[1:], pages_wanted.k[1:])
    assert jnp.array_equal(pages.v[1:], pages_wanted.v[1:])
    assert jnp.isfinite(got).all()


@pytest.mark.parametrize("cache_dtype", ["", "float8_e4m3fn", "int8"])
def test_sinks_and_pages_of_eight_bits_match_the_definition(cache_dtype: str) -> None:
    scaled = bool(cache_dtype)
    case = Case(rows=MIXED, chunks=CHUNKS, heads=(8, 2, 64), window=50, sinks=True, scaled=scaled)
    interpreted = functools.partial(gpu.attend, interpret=True, capability=gpu.FLOAT8)
    batch, got, want, pages, wanted = run(case, "float32", interpreted, cache_dtype)
    assert relative_error(got[batch.real], want[batch.real]) < TOLERANCE["float32"]
    assert jnp.array_equal(pages.k[1:], wanted.k[1:]) and jnp.array_equal(pages.v[1:], wanted.v[1:])


def test_many_query_heads_share_one_key_value_head() -> None:
    case = Case(rows=ROWS, heads=(40, 1, 32), sinks=True)
    batch, got, want, *_ = run(case, "float32", functools.partial(gpu.attend, interpret=True))
    assert relative_error(got[batch.real], want[batch.real]) < TOLERANCE["float32"]


@pytest.mark.parametrize("target", [1, 4, 32])
def test_any_number_of_parts_gives_the_same_rows(target: int) -> None:
    def split(*args: Any, **static: Any) -> Any:
        how = DecodeTuning(tile=16, parts=target * 2)
        return decode(*args, **static, tuning=how, interpret=True)

    batch, got, want, *_ = run(CASES["decode"], "float32", split)
    assert relative_error(got[batch.real], want[batch.real]) < TOLERANCE["float32"]
    assert not got[2].any(), "an idle row is zero"


@pytest.mark.parametrize("window", [0, 20])
def test_small_blocks_meet_the_diagonal_and_the_windows_edge(window: int) -> None:
    case = Case(rows=IDLE, chunks=CHUNKS, window=window)

    def small(q: Any, k: Any, v: Any, cache: Any, batch: Any, **static: Any) -> Any:
        cache = reference.write(cache, k, v, batch.dest)
        y = prefill(q, q, cache, batch, **static, tuning=PrefillTuning(16, 16), interpret=True)
        return y, cache

    batch, got, want, *_ = run(case, "float32", small)
    assert relative_error(got[batch.real], want[batch.real]) < TOLERANCE["float32"]


def test_a_merging_program_joins_several_heads_where_there_are_many_results(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gpu_decode, "FEW", 0)
    monkeypatch.setattr(gpu_decode, "ENOUGH", 1)

    def split(*args: Any, **static: Any) -> Any:
        how = DecodeTuning(tile=16, parts=64)
        return decode(*args, **static, tuning=how, interpret=True)

    batch, got, want, *_ = run(CASES["decode"], "float32", split)
    assert relative_error(got[batch.real], want[batch.real]) < TOLERANCE["float32"]


@pytest.mark.parametrize("window", [0, 20])
@pytest.mark.parametrize("target", [1, 6, 100])
def test_parts_cover_each_cached_token_once(target: int, window: int) -> None:
    *_, batch = cases.inputs(CASES["decode"])
    plan = plan_decode(batch, window=window, tile=16, target=target)
    seen: dict[int, list[int]] = {}
    for row, low, high, kind in plan.parts.tolist():
        if row < len(ROWS):
            begin = max(ROWS[row][0] + 1 - window, 0) if window else 0
            assert low in (begin, low // 16 * 16), "parts share no tile"
            seen.setdefault(row, []).extend(range(low, high))
            assert bool(kind & 1) == (high == ROWS[row][0]), "the last part takes the new token"
    wanted = {
        r: list(range(max(end + 1 - window, 0) if window else 0, end))
        for r, (end, count) in enumerate(ROWS)
        if count
    }
    assert seen == wanted


def test_a_row_alone_is_cut_into_parts_of_a_tile_at_least() -> None:
    *_, batch = cases.inputs(Case(rows=((100, 1),), pages_per_slot=8))
    plan = plan_decode(batch, window=0, tile=16, target=20)
    assert plan.parts.shape == (21, 4) and plan.rows.tolist() == [[0, 7]]
    assert [high - low for _, low, high, _ in plan.parts[:7].tolist()] == [16] * 6 + [4]


def test_blocks_cover_each_chunk_token_once() -> None:
    *_, batch = cases.inputs(CASES["chunks"])
    plan = plan_prefill(batch, 80, block=16, base=5).tolist()
    tokens = [token + i for token, size, *_ in plan for i in range(size)]
    assert sorted(tokens) == list(range(5, 85))


@pytest.mark.parametrize("window", [0, 32])
def test_the_blocks_that_see_most_keys_come_first_and_unused_ones_last(window: int) -> None:
    *_, batch = cases.inputs(CASES["chunks"])
    plan = plan_prefill(batch, 80, block=16)
    ordered, used = longest_first(plan, window)
    assert sorted(ordered.tolist()) == sorted(plan.tolist())
    assert int(used[0]) == sum(size > 0 for _, size, *_ in plan.tolist())
    seen = [
        min(position + size, (window or 10**6) + size) if slot >= 0 else 0
        for _, size, position, slot in ordered[: int(used[0])].tolist()
    ]
    assert seen == sorted(seen, reverse=True) and seen[0] > seen[-1]
    assert not any(size for _, size, *_ in ordered[int(used[0]) :].tolist())


def lowered(case: Case, **static: Any) -> str:
    """The step's program for an H100, which need not be there."""
    device = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        step = functools.partial(
            gpu.attend, window=case.window, scale=0.1, softcap=case.softcap, **static
        )
        traced = jax.jit(step).trace(*cases.inputs(case, dtype="bfloat16"))
        return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("heads", [(32, 8, 128), (14, 2, 64), (4, 1, 256)])
def test_lowers_for_cuda(heads: tuple[int, int, int]) -> None:
    text = lowered(Case(rows=MIXED, chunks=CHUNKS, heads=heads))
    for kernel in ("paged_decode", "merge_decode", "write_pages", "paged_prefill"):
        assert kernel in text


@pytest.mark.smoke
@pytest.mark.skipif(not writes_through_references(), reason="needs jax 0.11")
@pytest.mark.parametrize("window", [0, 100])
@pytest.mark.parametrize("heads", [(32, 8, 128), (14, 2, 64)])
@pytest.mark.parametrize("page_size", [16, 256])
def test_lowers_for_hopper(page_size: int, heads: tuple[int, int, int], window: int) -> None:
    case = Case(rows=MIXED, chunks=CHUNKS, heads=heads, page_size=page_size, window=window)
    assert "paged_prefill_hopper" in lowered(case, capability=gpu.H100)


def test_says_why_it_refuses_a_head_size() -> None:
    q, _, _, cache, batch = cases.inputs(Case(rows=ROWS, heads=(4, 2, 96)))
    assert gpu.why_not(q, cache, batch) == "D=96 is not a power of two between 32 and 256"


def test_says_why_it_refuses_a_card() -> None:
    q, _, _, cache, batch = cases.inputs(Case(rows=ROWS), cache_dtype="float8_e4m3fn")
    old, older = (
        gpu.why_not(q, cache, batch, capability=capability) for capability in ((8, 6), (7, 5))
    )
    assert old == "compute capability 8.6 cannot read float8_e4m3fn pages; 8.9 can"
    assert older == "compute capability 7.5 is older than 8.0"


def test_blocks_of_queries_fit_the_shared_memory_of_smaller_cards() -> None:
    for D, itemsize, kept in ((64, 2, 2), (128, 2, 1), (128, 2, 2), (256, 2, 2), (128, 4, 4)):
        tuning = prefill_tuning(D, itemsize, kept, gpu.LEAST_SHARED)
        assert tuning.shared(D, itemsize, kept) <= gpu.LEAST_SHARED
    assert prefill_tuning(128, 2, 2, gpu.SHARED[gpu.H100]) == PREFILL


@pytest.mark.parametrize(
    ("normed", "dtype", "turning"),
    [(True, "float32", 48), (True, "bfloat16", 64), (False, "float32", 64)],
)
def test_norms_and_turns_in_the_kernel_as_before_it(normed: bool, dtype: str, turning: int) -> None:
    case = Case(rows=ROWS, heads=(6, 2, 64), window=50)
    H, K, D = case.heads
    q, k, v, cache, batch = cases.inputs(case, dtype=dtype)
    mixed = jnp.concatenate([q.reshape(-1, K, H // K, D), k[:, :, None], v[:, :, None]], axis=2)
    weights = 1 + jnp.arange(2 * D, dtype=jnp.float32).reshape(2, D).astype(dtype) / D
    angle = batch.position[:, None, None] / 10.0 ** jnp.arange(turning // 2)
    turn = (jnp.cos(angle), jnp.sin(angle))
    static = dict(window=case.window, scale=D**-0.5, softcap=0.0)

    def prepared(x: jax.Array, weight: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32)
        if normed:
            unit = jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)
            x = (x * unit * (0.5 + weight.astype(jnp.float32))).astype(dtype).astype(jnp.float32)
        a, b, rest = jnp.split(x, [turning // 2, turning], axis=-1)
        turned = [a * turn[0] - b * turn[1], b * turn[0] + a * turn[1], rest]
        return jnp.concatenate(turned, axis=-1).astype(dtype)

    norms = weights if normed else None
    got, pages = gpu.attend_packed(
        mixed, turn, norms, cache, batch, **static, eps=1e-6, offset=0.5, interpret=True
    )
    q, k = prepared(q, weights[0]), prepared(k, weights[1])
    want, wanted = reference.attend(q, k, v, cache, batch, **static)
    assert relative_error(got[batch.real], want[batch.real]) < TOLERANCE[dtype]
    assert relative_error(pages.k[1:], wanted.k[1:]) < TOLERANCE[dtype] / 10
    assert jnp.array_equal(pages.v[1:], wanted.v[1:])
