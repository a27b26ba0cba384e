"""Gate, up and activation in one kernel: what it takes, and what it is built as.

`octavo.bench.gpu_matmul` compares it with XLA's products on a card.
"""

import functools
from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from octavo.models.layers import ACTIVATIONS
from octavo.pallas_kernels.gated import gpu, reference
from octavo.pallas_kernels.gated.gpu import _place, _Static
from octavo.pallas_kernels.mosaic import PROGRAMS, writes_through_references

NEW = pytest.mark.skipif(not writes_through_references(), reason="the kernel needs jax 0.11")


def shapes(N: int, E: int, F: int, dtype: str = "bfloat16") -> tuple[jax.Array, jax.Array]:
    return jnp.zeros((N, E), dtype), jnp.zeros((E, 2 * F), dtype)


@pytest.mark.parametrize(
    ("rows", "blocks", "band"), [(1, 5, 16), (2, 112, 16), (66, 7, 16), (5, 3, 2)]
)
def test_every_tile_is_worked_on_once(rows: int, blocks: int, band: int) -> None:
    c = _Static(4, rows, blocks, gpu.COLUMNS, band, None, None)
    row, column = jax.vmap(functools.partial(_place, c))(jnp.arange(rows * blocks))
    places = set(zip(np.asarray(row).tolist(), np.asarray(column).tolist(), strict=True))
    assert places == {(r, n) for r in range(rows) for n in range(blocks)}


def test_tiles_of_one_band_follow_one_another() -> None:
    c = _Static(4, 66, 112, gpu.COLUMNS, 16, None, None)
    row, column = jax.vmap(functools.partial(_place, c))(jnp.arange(PROGRAMS))
    assert int(row.max()) < 16 and int(column.max()) < 10


@pytest.mark.parametrize(
    ("given", "act", "capability", "said"),
    [
        ((128, 64, 128), "silu", (8, 0), "8.0 is not 9.0"),
        ((128, 64, 128), "gelu", (9, 0), "activation gelu"),
        pytest.param((128, 64, 128, "float32"), "silu", (9, 0), "16 bits", marks=NEW),
        pytest.param((128, 64, 192), "silu", (9, 0), "multiples of", marks=NEW),
        pytest.param((128, 96, 128), "silu", (9, 0), "multiples of", marks=NEW),
        pytest.param((132, 64, 128), "silu", (9, 0), "multiples of", marks=NEW),
    ],
)
def test_what_it_cannot_take_is_refused(
    given: Any, act: str, capability: tuple[int, int], said: str
) -> None:
    assert said in str(gpu.why_not(*shapes(*given), act, capability))


@NEW
def test_it_lowers_for_hopper() -> None:
    x, weight = shapes(576, 640, 2048)
    assert gpu.why_not(x, weight, "silu", (9, 0)) is None
    function = jax.jit(functools.partial(gpu.gated_linear, act="silu"))
    text = function.trace(x, weight).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text


def interpreted_error(N: int, E: int, F: int, act: str) -> float:
    """The kernel's relative error against the definition, interpreted with race detection."""
    plgpu: Any = import_module("jax.experimental.pallas.mosaic_gpu")
    keys = jax.random.split(jax.random.key(0))
    x = jax.random.normal(keys[0], (N, E), jnp.bfloat16)
    weight = 0.1 * jax.random.normal(keys[1], (E, 2 * F), jnp.bfloat16)
    interpreter = plgpu.InterpretGPUParams(detect_races=True)
    got = gpu.gated_linear(x, weight, act, interpret=interpreter).astype(jnp.float32)
    want = reference.gated_linear(x, weight, ACTIVATIONS[act]).astype(jnp.float32)
    return float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))


@NEW
@pytest.mark.smoke
@pytest.mark.parametrize(
    ("N", "E", "F", "act"), [(136, 192, 256, "silu"), (64, 320, 128, "gelu_tanh")]
)
def test_it_matches_the_definition_in_the_interpreter(N: int, E: int, F: int, act: str) -> None:
    assert interpreted_error(N, E, F, act) < 4e-3


@NEW
@pytest.mark.parametrize("F", [256, 384])
def test_programs_with_several_tiles_match_too(F: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "PROGRAMS", 3)
    assert gpu.columns_of(136, F) == (gpu.HALF if F == 256 else gpu.COLUMNS)
    assert interpreted_error(136, 128, F, "silu") < 4e-3


def test_tiles_are_narrow_where_that_keeps_more_programs_at_work() -> None:
    assert [gpu.columns_of(N, 3072) for N in (64, 256, 384, 768)] == [64, 64, 128, 64]
    assert {gpu.columns_of(N, 14336) for N in (128, 256, 512, 768, 8448)} == {128}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_definition_is_what_models_compute(name: str) -> None:
    keys = jax.random.split(jax.random.key(0))
    x, weight = jax.random.normal(keys[0], (5, 16)), jax.random.normal(keys[1], (16, 24))
    both, act = jnp.matmul(x, weight, precision="highest"), ACTIVATIONS[name]
    want = act(both[:, :12]) * both[:, 12:]
    np.testing.assert_allclose(reference.gated_linear(x, weight, act), want, rtol=1e-5)


@pytest.mark.parametrize("name", gpu.ACTIVATIONS)
def test_the_kernel_has_the_activations_of_the_models(name: str) -> None:
    x = jnp.linspace(-8, 8, 100)
    np.testing.assert_allclose(gpu.ACTIVATIONS[name](x), ACTIVATIONS[name](x), rtol=1e-6)
