"""Decode by Mosaic against the definition: interpreted with race detection, which jax 0.11 can."""

import functools
from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from octavo.pallas_kernels.attention import cases, gpu, gpu_decode, reference
from octavo.pallas_kernels.attention.cases import Case
from octavo.pallas_kernels.attention.gpu import Tuning
from octavo.pallas_kernels.attention.gpu_hopper_decode import (
    TILE,
    HopperDecodeTuning,
    by_length,
    parts_hopper,
    why_not_hopper_decode,
)
from octavo.pallas_kernels.mosaic import writes_through_references

pytestmark = pytest.mark.smoke
NEW = pytest.mark.skipif(not writes_through_references(), reason="the kernel needs jax 0.11")

CASES = {
    # Lengths of 16 tokens and one more or less, a whole tile, no token yet, an idle row; two groups
    # of heads in one copy; the last row in two parts.
    "lengths": (
        Case(
            rows=((0, 1), (5, 1), (0, 0), (100, 1), (64, 1), (63, 1), (49, 1), (250, 1)),
            heads=(8, 4, 128),
            page_size=64,
            pages_per_slot=4,
        ),
        16,
    ),
    "softcap, two heads a group, larger pages": (
        Case(
            rows=((300, 1), (17, 1), (0, 0), (130, 1)),
            heads=(16, 8, 128),
            page_size=128,
            pages_per_slot=4,
            softcap=5.0,
        ),
        16,
    ),
    "window": (
        Case(
            rows=((300, 1), (17, 1), (130, 1)),
            heads=(16, 2, 128),
            page_size=64,
            pages_per_slot=8,
            window=70,
        ),
        8,
    ),
}


@NEW
@pytest.mark.parametrize("name", CASES)
def test_matches_the_definition_without_races(name: str) -> None:
    plgpu: Any = import_module("jax.experimental.pallas.mosaic_gpu")
    case, pairs = CASES[name]
    q, k, v, cache, batch = cases.inputs(case, dtype="bfloat16")
    static = {"window": case.window, "scale": 128**-0.5, "softcap": case.softcap}
    want, pages_wanted = reference.attend(q, k, v, cache, batch, **static)
    interpreter = plgpu.InterpretGPUParams(detect_races=True)
    tuning = HopperDecodeTuning(pairs=pairs, programs=5)
    plan, results, pages = parts_hopper(
        q, k, v, cache, batch, **static, tuning=tuning, interpret=interpreter
    )
    assert not _races()
    assert int(plan.rows[:, 1].max()) > 1 or name == "window"
    y = gpu_decode.merge(plan, results, 16, interpret=True)
    got, wanted = (np.asarray(a, np.float32)[np.asarray(batch.real)] for a in (y, want))
    assert np.linalg.norm(got - wanted) < 6e-3 * np.linalg.norm(wanted)
    idle = np.asarray(batch.row_count) == 0
    assert not np.asarray(y, np.float32)[idle].any()
    for got_pages, wanted_pages in zip((pages.k, pages.v), (pages_wanted.k, pages_wanted.v)):
        assert jnp.array_equal(got_pages[1:], wanted_pages[1:])


def test_the_longest_parts_come_first_with_their_numbers_and_pages() -> None:
    case = CASES["lengths"][0]
    *_, batch = cases.inputs(case, dtype="bfloat16")
    parts = gpu_decode.plan_decode(batch, window=0, tile=TILE, target=4).parts
    ordered = np.asarray(by_length(parts, batch.table, case.page_size))
    assert sorted(ordered[:, 4].tolist()) == list(range(len(parts)))
    assert np.array_equal(ordered[:, :4], np.asarray(parts)[ordered[:, 4]])
    used = ordered[ordered[:, 0] < len(case.rows)]
    assert np.array_equal(used, ordered[: len(used)]), "what is not used comes last"
    tiles = -(-(used[:, 2] - used[:, 1]) // TILE) + (used[:, 3] & 1)
    assert (np.diff(tiles) <= 0).all() and tiles[0] > tiles[-1]
    table = np.asarray(batch.table)
    assert np.array_equal(used[:, 5], table[used[:, 0], used[:, 1] // case.page_size])


@NEW
def test_a_step_without_decode_rows_gives_zeros() -> None:
    plgpu: Any = import_module("jax.experimental.pallas.mosaic_gpu")
    q, k, v, cache, batch = cases.inputs(Case(rows=((0, 0),) * 8, heads=(8, 4, 128), page_size=64))
    q, k, v = (x.astype(jnp.bfloat16) for x in (q, k, v))
    cache = jax.tree.map(lambda x: x.astype(jnp.bfloat16), cache)
    interpreter = plgpu.InterpretGPUParams(detect_races=True)
    plan, results, pages = parts_hopper(q, k, v, cache, batch, scale=0.1, interpret=interpreter)
    assert not np.asarray(gpu_decode.merge(plan, results, 16, interpret=True), np.float32).any()
    assert jnp.array_equal(pages.k, cache.k) and jnp.array_equal(pages.v, cache.v)


def _races() -> bool:
    """Whether the interpreter saw a race."""
    races = import_module("jax._src.pallas.mosaic_gpu.interpret.gpu_callbacks").get_races()
    return bool(getattr(races, "races_found", races))


@NEW
def test_it_is_taken_from_the_rows_that_are_asked_for() -> None:
    q, k, v, cache, batch = cases.inputs(CASES["lengths"][0], dtype="bfloat16")

    def text(least: int) -> str:
        tuning = Tuning(hopper_decode=HopperDecodeTuning(least_rows=least))
        attend = functools.partial(
            gpu.attend, window=0, scale=0.1, softcap=0.0, capability=gpu.H100, tuning=tuning
        )
        device = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu")
        mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
        with jax.sharding.use_abstract_mesh(mesh):
            traced = jax.jit(attend).trace(q, k, v, cache, batch)
            return str(traced.lower(lowering_platforms=("cuda",)).as_text())

    assert "paged_decode_hopper" in text(8) and "paged_decode_hopper" not in text(9)


@NEW
@pytest.mark.parametrize(
    ("case", "dtype", "said"),
    [
        (Case(rows=((5, 1),) * 8, heads=(8, 4, 64), page_size=64), "bfloat16", "D=64"),
        (Case(rows=((5, 1),) * 8, heads=(8, 4, 128)), "bfloat16", "pages of 16"),
        (Case(rows=((5, 1),) * 8, heads=(8, 4, 128), page_size=64), "float32", "16 bits"),
        (Case(rows=((5, 1),) * 8, heads=(4, 4, 128), page_size=64), "bfloat16", "in eights"),
        (Case(rows=((5, 1),) * 8, heads=(64, 1, 128), page_size=64), "bfloat16", "no room"),
    ],
)
def test_what_it_cannot_take_is_refused(case: Case, dtype: str, said: str) -> None:
    q, _, _, cache, batch = cases.inputs(case, dtype=dtype)
    assert said in str(why_not_hopper_decode(q, cache.k, batch))


@NEW
def test_sinks_and_scales_are_left_to_the_other_kernel() -> None:
    q, _, _, cache, batch = cases.inputs(CASES["lengths"][0], dtype="bfloat16")
    assert why_not_hopper_decode(q, cache.k, batch) is None
    assert "sinks" in str(why_not_hopper_decode(q, cache.k, batch, (jnp.zeros(8), None)))
