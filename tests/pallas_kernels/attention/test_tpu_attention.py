"""The TPU kernels against the definition: interpreted, with race detection and memory of NaN.

The interpreter takes seconds a case, so that few run here. `make aot` runs as many as
TPU_RANDOM_STEPS says, and compiles for real chips (test_tpu_compile.py).
"""

import os
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from octavo.pallas_kernels.attention import cases, reference, tpu
from octavo.pallas_kernels.attention.cases import Case
from octavo.pallas_kernels.attention.tpu_layout import Layout

RANDOM_STEPS = int(os.environ.get("TPU_RANDOM_STEPS", "3"))


def machine(cores: int = 1) -> pltpu.InterpretParams:
    """A chip of so many cores, with memory that begins as NaN, that tells of races."""
    return pltpu.InterpretParams(
        detect_races=True, uninitialized_memory="nan", num_cores_or_threads=cores
    )


STRICT = machine()
# The queries, the probabilities and the result are rounded to bfloat16, or to two 8-bit parts.
TOLERANCE = {"float32": 2e-5, "bfloat16": 1e-2, "int8": 1e-2, "float8_e4m3fn": 2e-2}
RACE = "RACE DETECTED"  # what the interpreter prints

ROWS = ((0, 1), (15, 1), (0, 0), (63, 1), (100, 1), (16, 1))
CHUNKS = ((0, 0, 33), (2, 70, 21), (4, 15, 1))
IDLE = ((0, 0),) * 5
MIXED = ((0, 0), (63, 1), (0, 0), (100, 1), (0, 0))


def packed(cache: reference.KV) -> jax.Array:
    """The definition's pages as a TPU keeps them."""
    P, K, S, D = cache.k.shape
    layout = Layout(K, 1, D)
    k, v = (x.swapaxes(1, 2).reshape(P * S, K, D) for x in (cache.k, cache.v))
    return layout.new_rows(k, v).reshape(P, S, layout.tiles, layout.width).swapaxes(1, 2)


def relative_error(got: jax.Array, want: jax.Array) -> float:
    got, want = got.astype(jnp.float32), want.astype(jnp.float32)
    return float(jnp.linalg.norm(got - want) / jnp.maximum(jnp.linalg.norm(want), 1e-9))


def check(case: Case, kind: str, capfd: Any = None, seed: int = 0, cores: int = 1) -> None:
    case = replace(case, scaled=case.scaled or kind == "int8")
    q, k, v, cache, batch = cases.inputs(case, seed, "float32", kind)
    q = q.astype(jnp.bfloat16)  # so that both sides begin with the same
    q = q if kind != "float32" else q.astype(jnp.float32)
    static: dict[str, Any] = dict(window=case.window, softcap=case.softcap)
    static |= dict(scale=q.shape[-1] ** -0.5) | cases.extras(case, seed)
    want, after = reference.attend(q, k, v, cache, batch, **static)
    ours: dict[str, Any] = dict(chunk=64, cores=cores, interpret=machine(cores))
    got, pages = tpu.attend(q, k, v, tpu.TpuKV(packed(cache)), batch, **static, **ours)
    got.block_until_ready()
    real = batch.real
    assert relative_error(got[real], want[real]) < TOLERANCE[kind]
    assert jnp.array_equal(pages.pages[1:], packed(after)[1:])
    assert jnp.isfinite(got).all()
    if capfd is not None:
        assert RACE not in "".join(capfd.readouterr())


STEPS = {
    "rows": Case(rows=ROWS, heads=(8, 2, 128)),
    "rows of one head": Case(rows=ROWS[:3], heads=(4, 1, 128), window=20),
    "rows of small heads": Case(rows=ROWS[:4], heads=(6, 2, 64), softcap=5.0),
    "rows of large heads": Case(rows=ROWS[:4], heads=(2, 2, 256)),
    "chunks": Case(rows=IDLE, chunks=CHUNKS, chunk_tokens=80, chunk_entries=5),
    "chunks in a window": Case(rows=IDLE, chunks=CHUNKS, window=20, softcap=5.0, heads=(4, 2, 128)),
    "a chunk of an odd group": Case(
        rows=IDLE[:1], chunks=((0, 20, 30),), chunk_tokens=32, chunk_entries=1, heads=(7, 1, 128)
    ),
    "mixed": Case(rows=MIXED, chunks=CHUNKS, chunk_tokens=64, heads=(8, 2, 64)),
    "rows with sinks": Case(rows=ROWS[:4], heads=(8, 2, 128), sinks=True, softcap=9.0),
    "chunks with sinks": Case(
        rows=((63, 1), (0, 0)), chunks=((1, 9, 40),), heads=(4, 2, 64), sinks=True, window=20
    ),
    "nothing": Case(rows=((0, 0), (9, 0)), chunk_tokens=16, chunk_entries=2),
}


@pytest.mark.parametrize("name", STEPS)
def test_matches_the_definition_without_races(name: str, capfd: Any) -> None:
    check(STEPS[name], "bfloat16", capfd)


@pytest.mark.parametrize("kind", ["int8", "float8_e4m3fn"])
def test_8_bit_pages_lose_no_more_than_bfloat16(kind: str, capfd: Any) -> None:
    case = Case(rows=MIXED, chunks=CHUNKS[:1], heads=(4, 2, 128), page_size=32, pages_per_slot=4)
    check(case, kind, capfd)


@pytest.mark.parametrize("rows", [ROWS, ROWS[:1], MIXED], ids=["rows", "one", "mixed"])
def test_two_cores_share_the_work(rows: Any, capfd: Any) -> None:
    chunks = CHUNKS[:2] if rows is MIXED else ()
    case = Case(rows=rows, chunks=chunks, heads=(4, 2, 128), pages_per_slot=8, sinks=True)
    check(case, "bfloat16", capfd, cores=2)


def test_long_prompts_take_several_blocks_and_buffers(capfd: Any) -> None:
    rows = ((0, 0), (0, 0))
    case = Case(rows, ((1, 600, 200), (0, 0, 130)), pages_per_slot=14, page_size=64)
    check(case, "bfloat16", capfd)
    check(replace(case, window=150), "bfloat16", capfd)


def test_rows_may_share_the_pages_of_a_prefix() -> None:
    case = Case(rows=((70, 1), (40, 1)), heads=(4, 2, 128))
    q, k, v, cache, batch = cases.inputs(case, dtype="bfloat16")
    batch = replace(batch, table=batch.table.at[1, :2].set(batch.table[0, :2]))
    static: dict[str, Any] = dict(window=0, scale=0.1, softcap=0.0)
    want, _ = reference.attend(q, k, v, cache, batch, **static)
    got, _ = tpu.attend(q, k, v, tpu.TpuKV(packed(cache)), batch, **static, interpret=STRICT)
    assert relative_error(got, want) < TOLERANCE["bfloat16"]


def test_a_layer_among_others_keeps_to_its_own_pages() -> None:
    case = Case(rows=((5, 1), (0, 0)), chunks=((1, 3, 20),), chunk_tokens=32, heads=(4, 2, 128))
    q, k, v, cache, batch = cases.inputs(case, dtype="bfloat16")
    static: dict[str, Any] = dict(window=0, scale=0.1, softcap=0.0)
    alone = tpu.TpuKV(packed(cache))
    want, after = tpu.attend(q, k, v, alone, batch, **static, interpret=STRICT)
    others = jnp.full_like(alone.pages, 7)
    stack = tpu.TpuKV(jnp.stack([others, alone.pages, others]), jnp.int32(1))
    got, stack = tpu.attend(q, k, v, stack, batch, **static, interpret=STRICT)
    assert jnp.array_equal(got, want)
    assert jnp.array_equal(stack.pages[1], after.pages)
    assert (stack.pages[::2] == 7).all()


@st.composite
def steps(draw: Any) -> tuple[Case, str]:
    """Lengths lie on the edges of pages and buffers more often than not."""
    kind = draw(st.sampled_from(["bfloat16", "bfloat16", "int8", "float8_e4m3fn"]))
    page = 16 if kind == "bfloat16" else 32
    length = st.one_of(st.sampled_from([0, 1, page - 1, page, 63, 64, 127]), st.integers(0, 150))
    rows, chunks = [], []
    for slot in range(draw(st.integers(1, 5))):
        what, before = draw(st.sampled_from(["row", "row", "idle", "chunk"])), draw(length)
        rows.append((before, 1) if what == "row" else (0, 0))
        if what == "chunk":
            chunks.append((slot, before, draw(st.integers(1, 40))))
    case = Case(
        rows=tuple(rows),
        chunks=tuple(draw(st.permutations(chunks))),
        heads=draw(
            st.sampled_from([(4, 2, 64), (8, 2, 128), (3, 1, 128), (4, 4, 128), (2, 1, 256)])
        ),
        page_size=page,
        pages_per_slot=192 // page,
        chunk_tokens=draw(st.sampled_from([0, 64])),
        chunk_entries=3,
        window=draw(st.sampled_from([0, 0, 1, 17, 64])),
        softcap=draw(st.sampled_from([0.0, 0.0, 10.0])),
    )
    return case, kind


@settings(
    max_examples=RANDOM_STEPS,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],  # a smaller example is not worth minutes of the interpreter
    suppress_health_check=list(HealthCheck),
)
@given(steps(), st.integers(0, 99))
def test_any_ragged_step_matches_the_definition(step: tuple[Case, str], seed: int) -> None:
    check(*step, seed=seed)


def test_the_interpreter_tells_of_a_missing_wait(capfd: Any) -> None:
    """What the other tests rely on."""

    def careless(x: Any, y: Any, buffer: Any, sem: Any) -> None:
        copy = pltpu.make_async_copy(x, buffer, sem)
        copy.start()
        y[...] = buffer[...]
        copy.wait()

    x = jnp.ones((8, 128))
    pl.pallas_call(
        careless,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
        scratch_shapes=[pltpu.VMEM(x.shape, x.dtype), pltpu.SemaphoreType.DMA],
        interpret=STRICT,
    )(x).block_until_ready()
    assert RACE in "".join(capfd.readouterr())


def test_pages_take_the_bytes_that_were_predicted() -> None:
    for heads, size in ((8, 128), (2, 64), (1, 256), (3, 96)):
        cache = tpu.init_kv(10, 32, heads, size, "bfloat16")
        assert cache.pages.nbytes == 10 * tpu.page_bytes(1, 32, heads, size, "bfloat16")


@pytest.mark.parametrize("kind, page", [("bfloat16", 8), ("int8", 16)])
def test_a_page_below_one_tile_is_refused(kind: str, page: int) -> None:
    q, k, v, cache, batch = cases.inputs(Case(rows=((0, 1),), page_size=page))
    pages = tpu.TpuKV(packed(cache).astype(kind))
    with pytest.raises(ValueError, match=f"at least {2 * page} tokens, got {page}"):
        tpu.attend(q, k, v, pages, batch, window=0, scale=1.0, softcap=0.0)


def test_layouts_bring_queries_to_their_own_heads() -> None:
    rng = np.random.default_rng(0)
    for K, G, D in ((2, 4, 128), (4, 2, 64), (1, 5, 128), (2, 1, 256)):
        layout = Layout(K, G, D)
        q = jnp.asarray(rng.normal(size=(3, K * G, D)), "float32")
        spread = layout.queries(q)
        assert spread.shape == (3, layout.units, layout.rows, layout.lanes)
        if not layout.shared:
            assert jnp.array_equal(layout.heads(spread), q)
