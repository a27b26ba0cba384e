"""The backend records: what they choose, refuse and compute."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from octavo.backends import BackendError, cpu, gpu, plain, select
from octavo.backends.neuron.errors import NeuronError
from octavo.backends.record import doubling
from octavo.models.ops import LayerSpec, Linear


def test_auto_takes_what_jax_found_and_says_so() -> None:
    assert select("auto").name == select("cpu").name == "cpu"
    assert "jax found first" in select("auto").reason
    assert "--device cpu" in select("cpu").reason


@pytest.mark.parametrize("device", ["tpu", "neuron", "gpu"])
def test_a_device_that_is_not_there_is_refused_with_the_next_step(device: str) -> None:
    with pytest.raises((BackendError, NeuronError), match=f"no .*{device}.*use --device cpu"):
        select(device)


def test_buckets_double_and_end_with_the_limit() -> None:
    assert doubling(1, 1) == (1,)
    assert doubling(1, 48) == (1, 2, 4, 8, 16, 32, 48)
    assert select("cpu").token_buckets(512) == (32, 128, 512)
    assert select("cpu").token_buckets(16) == (16,)


def test_the_cache_takes_the_bytes_that_were_predicted() -> None:
    backend = select("cpu")
    specs = (LayerSpec(group=0), LayerSpec(group=1, window=8), LayerSpec(group=1, window=8))
    cache = backend.init_cache(specs, (10, 4), 16, 2, 64, "bfloat16")
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
    per_group = [backend.page_bytes(n, 16, 2, 64, "bfloat16") for n in (1, 2)]
    assert held == 10 * per_group[0] + 4 * per_group[1]


@pytest.mark.parametrize("out", [(24,), (2, 3, 4)])
def test_linear_keeps_the_axes_of_its_output(out: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    x, w, b = (jnp.asarray(rng.normal(size=s), "float32") for s in ((5, 8), (8, *out), out))
    got = plain.linear(x, Linear(w, b))
    assert got.shape == (5, *out)
    np.testing.assert_allclose(got, jnp.tensordot(x, w, 1) + b, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_cpu_multiplies_any_number_of_rows(rows: int, dtype: str) -> None:
    rng = np.random.default_rng(0)
    x, w, b = (jnp.asarray(rng.normal(size=s), dtype) for s in ((rows, 64), (64, 2, 3), (2, 3)))
    exact = np.tensordot(np.asarray(x, np.float64), np.asarray(w, np.float64), 1)
    got = select("cpu").linear(x, Linear(w, b))
    assert got.dtype == x.dtype and got.shape == (rows, 2, 3)
    rounding = 2 * float(jnp.finfo(dtype).eps) * np.abs(exact).max()
    np.testing.assert_allclose(np.asarray(got, np.float64), exact + b, atol=rounding)
    logits = select("cpu").head(x, w.reshape(64, -1).T)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, exact.reshape(rows, -1), atol=1e-4)


@pytest.mark.parametrize(("rows", "halved"), [(128, False), (136, True), (256, True), (264, False)])
def test_a_gpu_takes_a_large_product_of_a_long_depth_in_two_halves(
    rows: int, halved: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "LARGE", 384 * 128)
    rng = np.random.default_rng(0)
    x, w, b = (jnp.asarray(rng.normal(size=s), "bfloat16") for s in ((rows, 384), (384, 128), 128))
    by_half = partial(gpu.linear, choices=gpu.CHOICES)
    products = str(jax.make_jaxpr(by_half)(x, Linear(w, b)))
    assert products.count("2,192,128") == halved, products
    exact = np.asarray(x, np.float64) @ np.asarray(w, np.float64) + np.asarray(b, np.float64)
    for other in (Linear(w, b), Linear(w.reshape(384, 2, 64), b.reshape(2, 64))):
        got = np.asarray(by_half(x, other), np.float64).reshape(rows, 128)
        np.testing.assert_allclose(got, exact, atol=2 * 2**-8 * np.abs(exact).max())


def loop_instead_of_a_kernel(x: jax.Array, weight: jax.Array, sizes: jax.Array) -> jax.Array:
    """On a GPU, where 6 columns are none of its kernel's multiples of 16."""
    return gpu.grouped_linear(x, weight, sizes, capability=(9, 0))


EXPERTS = [jax.jit(f) for f in (plain.grouped_linear, loop_instead_of_a_kernel)]


@pytest.mark.parametrize("experts", EXPERTS, ids=["plain", "gpu"])
@pytest.mark.parametrize("sizes", [(3, 0, 60, 7), (0, 0, 0, 0), (0, 0, 0, 100), (1, 1, 1, 1)])
def test_every_row_meets_its_own_expert(experts: Any, sizes: tuple[int, ...]) -> None:
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(100, 8)), "float32")
    weight = jnp.asarray(rng.normal(size=(4, 8, 6)), "float32")
    got = experts(x, weight, jnp.asarray(sizes, jnp.int32))
    expert = np.repeat(np.arange(4), sizes)
    want = jnp.einsum("ni,nio->no", x[: len(expert)], weight[expert])
    assert np.isfinite(np.asarray(got)).all()
    np.testing.assert_allclose(got[: len(expert)], want, atol=1e-5)


@dataclass
class Files:
    """A root folder with the kernel's files, written for the test."""

    root: Path

    def write(self, name: str, text: str) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_memory_is_what_the_container_leaves(tmp_path: Path) -> None:
    files = Files(tmp_path)
    files.write("proc/meminfo", "MemTotal: 2000 kB\nMemFree: 50 kB\nMemAvailable: 1000 kB\n")
    assert cpu.available_memory(tmp_path) == 1000 * 1024
    files.write("sys/fs/cgroup/memory.max", "max\n")
    files.write("sys/fs/cgroup/memory.current", "600000\n")
    files.write("sys/fs/cgroup/memory.stat", "anon 1\ninactive_file 100000\n")
    assert cpu.available_memory(tmp_path) == 1000 * 1024
    files.write("sys/fs/cgroup/memory.max", "700000\n")
    assert cpu.available_memory(tmp_path) == 200000
    files.write("sys/fs/cgroup/memory.max", "400000\n")
    assert cpu.available_memory(tmp_path) == 0


def test_memory_of_this_machine_is_positive() -> None:
    assert cpu.available_memory() > 0
