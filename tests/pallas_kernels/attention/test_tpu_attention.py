"""The TPU kernels against the definition: interpreted, with race detection and memory of NaN.

To compile for the interpreter takes seconds, a step of a compiled shape less than one: random steps
come in a few shapes. `make aot` runs more of them (TPU_RANDOM_STEPS of each shape), and compiles
for real chips (test_tpu_compile.py).
"""

import os
import time
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
from octavo.pallas_kernels.attention.tpu_decode import chunk_tokens
from octavo.pallas_kernels.attention.tpu_layout import Layout, divide

RANDOM_STEPS = int(os.environ.get("TPU_RANDOM_STEPS", "25"))
AOT = "TPU_RANDOM_STEPS" in os.environ


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
IDLE = ((0, 0),) * 5


DEFINITION = jax.jit(reference.attend, static_argnames=("window", "scale", "softcap"))


def packed(cache: reference.KV) -> jax.Array:
    """The definition's pages as a TPU keeps them."""
    P, K, S, D = cache.k.shape
    layout = Layout(K, 1, D)
    k, v = (x.swapaxes(1, 2).reshape(P * S, K, D) for x in (cache.k, cache.v))
    return layout.new_rows(k, v).reshape(P, S, layout.tiles, layout.width).swapaxes(1, 2)


@jax.jit
def relative_error(got: jax.Array, want: jax.Array, real: jax.Array) -> jax.Array:
    """Of the tokens of [N, H, D] that are `real` bool[N]; one program, however many those are."""
    got, want = (jnp.where(real[:, None, None], x.astype(jnp.float32), 0) for x in (got, want))
    return jnp.linalg.norm(got - want) / jnp.maximum(jnp.linalg.norm(want), 1e-9)


def check(
    case: Case, kind: str, capfd: Any = None, seed: int = 0, cores: int = 1, at_once: int = 1
) -> None:
    """One step beside the definition. The kernels share it among `cores`, and of these `at_once`
    run at the same time, so that races between them are seen: the interpreter then compiles every
    kernel again at every step, for 12 s."""
    case = replace(case, scaled=case.scaled or kind == "int8")
    q, k, v, cache, batch = cases.inputs(case, seed, "float32", kind)
    q = q.astype(jnp.bfloat16)  # so that both sides begin with the same
    q = q if kind != "float32" else q.astype(jnp.float32)
    static: dict[str, Any] = dict(window=case.window, softcap=case.softcap)
    static |= dict(scale=q.shape[-1] ** -0.5) | cases.extras(case, seed)
    want, after = DEFINITION(q, k, v, cache, batch, **static)
    ours: dict[str, Any] = dict(chunk=64, cores=cores, interpret=machine(at_once))
    got, pages = tpu.attend(q, k, v, tpu.TpuKV(packed(cache)), batch, **static, **ours)
    got.block_until_ready()
    assert relative_error(got, want, batch.real) < TOLERANCE[kind]
    assert jnp.array_equal(pages.pages[1:], packed(after)[1:])
    assert jnp.isfinite(got).all()
    if capfd is not None:
        assert RACE not in "".join(capfd.readouterr())


STEPS = {
    "rows alone": Case(rows=ROWS, heads=(6, 2, 64), softcap=5.0),
    "a prefix is shared": Case(rows=ROWS, heads=(6, 2, 64), softcap=5.0, shared=((4, 3, 3),)),
    "large heads": Case(rows=ROWS[:4], chunks=((2, 0, 20),), heads=(2, 2, 256)),
    "a chunk of an odd group": Case(
        rows=IDLE[:1], chunks=((0, 20, 30),), chunk_tokens=32, chunk_entries=1, heads=(7, 1, 128)
    ),
    "nothing": Case(rows=((0, 0), (9, 0)), chunk_tokens=16, chunk_entries=2),
}


@pytest.mark.parametrize("name", STEPS)
def test_matches_the_definition_without_races(name: str, capfd: Any) -> None:
    check(STEPS[name], "bfloat16", capfd)


def test_a_core_may_be_left_without_work(capfd: Any) -> None:
    check(
        Case(rows=ROWS[1:2], heads=(4, 2, 128), sinks=True), "bfloat16", capfd, cores=2, at_once=2
    )


def test_long_prompts_take_several_blocks_and_buffers(capfd: Any) -> None:
    rows = ((0, 0), (0, 0))
    case = Case(rows, ((1, 600, 200), (0, 0, 130)), pages_per_slot=14, page_size=64)
    check(case, "bfloat16", capfd)
    check(replace(case, window=150), "bfloat16", capfd)


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


# Of one shape there is one program, so that most random steps cost no compilation.
SHAPES = {
    "pairs": (Case(rows=(), heads=(8, 2, 128), softcap=10.0, sinks=True), "bfloat16", 1),
    "two cores": (Case(rows=(), heads=(3, 1, 128), window=17), "bfloat16", 2),
    "small heads": (Case(rows=(), heads=(4, 2, 64), page_size=32, scaled=True), "int8", 1),
    "8 bits": (Case(rows=(), heads=(4, 4, 128), page_size=32, window=64), "float8_e4m3fn", 1),
}
MORE = {  # of `make aot` alone
    "large heads": (Case(rows=(), heads=(4, 2, 256), window=40), "bfloat16", 1),
    "large heads of 8 bits": (Case(rows=(), heads=(2, 1, 256), page_size=32), "float8_e4m3fn", 2),
    "64 slots": (Case(rows=((0, 0),) * 64, heads=(4, 1, 64)), "bfloat16", 1),
}
RANDOM = [*SHAPES, *(pytest.param(name, marks=pytest.mark.aot) for name in MORE if AOT)]
SLOTS, LONGEST, PROMPTS = 4, 192, 64


@st.composite
def filled(draw: Any, shape: Case) -> Case:
    """Lengths lie on the edges of pages and buffers more often than not, and neighbours may have
    the pages of a prefix in common. Of many slots, the last are idle as often as not."""
    page, slots = shape.page_size, max(SLOTS, len(shape.rows))
    length = st.one_of(st.sampled_from([0, 1, page - 1, page, 63, 64, 127]), st.integers(0, 150))
    chunks: list[tuple[int, int, int]] = []
    rows, cached, room = [], [], PROMPTS
    used = draw(st.integers(1, slots)) if slots > SLOTS else slots
    for slot in range(slots):
        what = draw(st.sampled_from(["row", "row", "idle", "chunk"])) if slot < used else "idle"
        before = draw(length) if what != "idle" else 0
        rows.append((before, 1) if what == "row" else (0, 0))
        if what == "chunk" and room and len(chunks) < SLOTS:
            chunks.append((slot, before, draw(st.integers(1, min(40, room)))))
            room -= chunks[-1][2]
        elif what == "chunk":
            before = 0
        cached.append(before)
    shared = []
    for slot in range(1, used, 2):
        if most := min(cached[slot - 1 : slot + 1]) // page:
            shared.append((slot, slot - 1, draw(st.integers(0, most))))
    return replace(
        shape,
        rows=tuple(rows),
        chunks=tuple(draw(st.permutations(chunks))),
        pages_per_slot=LONGEST // page,
        chunk_tokens=PROMPTS,
        chunk_entries=SLOTS,
        shared=tuple(shared),
    )


def any_step(name: str, steps: int, capfd: Any, at_once: int = 1) -> None:
    """So many random steps of a shape, the same ones every time."""
    shape, kind, cores = (SHAPES | MORE)[name]
    began, done = time.monotonic(), 0

    @settings(
        max_examples=steps,
        deadline=None,
        derandomize=True,
        phases=[Phase.generate],  # a smaller example is not worth minutes of the interpreter
        suppress_health_check=list(HealthCheck),
    )
    @given(filled(shape), st.integers(0, 99))
    def holds(case: Case, seed: int) -> None:
        nonlocal done
        check(case, kind, capfd, seed, cores, at_once)
        done += 1
        if AOT and done in (steps, done // 50 * 50):  # minutes pass
            with capfd.disabled():
                print(f"\n{name}: {done} steps in {time.monotonic() - began:,.0f} s", flush=True)

    holds()


@pytest.mark.parametrize("name", RANDOM)
def test_any_ragged_step_matches_the_definition(name: str, capfd: Any) -> None:
    many = name == "64 slots"  # a step of those takes ten times as long
    any_step(name, RANDOM_STEPS // 5 if many else RANDOM_STEPS, capfd)


def test_two_cores_at_once_do_not_race(capfd: Any) -> None:
    any_step("two cores", max(1, RANDOM_STEPS // 25), capfd, at_once=2)


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


@pytest.mark.parametrize(
    "work, parts, first",
    [
        ([4, 4, 0], 2, [0, 1, 2]),
        ([8, 0, 0], 2, [0, 0, 1]),
        ([10, 1, 1], 2, [0, 1, 3]),
        ([1, 1, 10], 2, [0, 2, 3]),
        ([0, 0, 0], 2, [0, 0, 0]),
        ([3, 3, 3], 1, [0, 3]),
    ],
    ids=str,
)
def test_cores_get_runs_of_about_the_same_work(
    work: list[int], parts: int, first: list[int]
) -> None:
    used = sum(x > 0 for x in work)
    assert divide(jnp.asarray(work), jnp.int32(used), parts).tolist() == first


def test_the_chips_that_differ_are_known_by_both_of_their_names() -> None:
    assert tpu.chip("TPU v5") == tpu.chip("v5p") == tpu.chip("TPU v4") == {"cores": 2}
    assert tpu.chip("TPU v5 lite") == tpu.chip("v5e") == tpu.chip("TPU v6 lite") == {}
    assert tpu.chip("TPU7x") == tpu.chip("tpu7x") == {"native": ("float8_e4m3fn",)}


def test_more_tokens_are_taken_at_once_where_heads_are_few_and_rows_long() -> None:
    llama, qwen = Layout(8, 4, 128), Layout(2, 7, 64)
    assert chunk_tokens(llama, 16, "bfloat16", 1 << 17) == 1024
    assert chunk_tokens(llama, 16, "bfloat16", 1024) == 512
    assert chunk_tokens(qwen, 16, "bfloat16", 1 << 17) == 2048
    assert chunk_tokens(Layout(32, 1, 256), 16, "bfloat16", 1 << 17) == 128
