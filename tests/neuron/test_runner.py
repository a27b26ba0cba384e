"""Graphs on the emulator of libnrt, through ctypes; emulator/README.md says what that proves."""

import gc
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from octavo.backends.neuron import errors, nrt
from octavo.backends.neuron.export import Graph, Signature, export
from octavo.backends.neuron.runner import Cores, Program
from tests.neuron.emulator.host import Emulator
from tests.neuron.fake_neuronx_cc import container

ROOT = Path(__file__).resolve().parents[2]


def abstract(*shape: int, dtype: str = "float32") -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


def step() -> Graph:
    """A cache that is written in place, a result, and a leaf that only passes through."""

    def function(state: dict, x: jax.Array) -> tuple[dict, jax.Array]:
        kv = state["kv"].at[2].set(x, mode="promise_in_bounds")
        return {"kv": kv, "same": state["same"]}, jnp.sum(kv, axis=0) * 2

    state = {"kv": abstract(4, 8), "same": abstract(3, dtype="int32")}
    signature = Signature("step", ("state", "x"), ("state", "y"))
    return export(function, (state, abstract(8)), signature, donate=(0,))


def load(cores: Cores, graph: Graph) -> Program:
    return cores.load(graph.exported, container(graph.exported.hlo, graph.exported.name))


@pytest.fixture
def cores(emulator: Emulator, emulator_library: Path) -> Iterator[Cores]:
    cores = Cores(str(emulator_library))
    yield cores
    cores.close()


def test_arrays_go_to_the_emulated_core_and_come_back(cores) -> None:
    for array in (
        np.arange(6, dtype=np.int32).reshape(2, 3),
        np.ones(4, jnp.bfloat16),
        np.array(7),
    ):
        there = cores.put(array)
        assert there.shape == array.shape and there.dtype == array.dtype and there.is_ready()
        np.testing.assert_array_equal(np.asarray(there), array)
    np.testing.assert_array_equal(np.asarray(cores.zeros((2, 2), "float32")), np.zeros((2, 2)))


def test_a_graph_updates_its_cache_in_place_on_the_emulator(cores, emulator) -> None:
    graph = step()
    call = graph.call(load(cores, graph))
    state = {"kv": cores.zeros((4, 8), "float32"), "same": cores.put(np.arange(3, dtype=np.int32))}
    kv, handle = state["kv"], state["kv"].buffers.handles
    for i in range(1, 4):
        x = np.full(8, i, np.float32)
        state, y = call(state, cores.put(x))
        np.testing.assert_array_equal(np.asarray(y), 2 * x)
    assert state["kv"].buffers.handles == handle, "the cache stayed where it was"
    np.testing.assert_array_equal(np.asarray(state["same"]), np.arange(3))
    with pytest.raises(RuntimeError, match="updated in place"):
        np.asarray(kv)
    assert kv.is_deleted() and not state["kv"].is_deleted()


def test_memory_is_used_again_when_nobody_holds_it(cores, emulator) -> None:
    graph = step()
    call = graph.call(load(cores, graph))
    state = {"kv": cores.zeros((4, 8), "float32"), "same": cores.put(np.arange(3, dtype=np.int32))}
    for _ in range(3):
        state, y = call(state, cores.put(np.ones(8, np.float32)))
        np.asarray(y)
    gc.collect()
    before = emulator.counts()
    for _ in range(20):
        state, y = call(state, cores.put(np.ones(8, np.float32)))
        np.asarray(y)
    tensors, sets, models = emulator.counts()
    assert tensors <= before[0] + 1 and sets <= before[1] + 8 and models == 1


def test_a_failure_comes_out_where_a_result_is_read(cores, emulator) -> None:
    graph = step()
    call = graph.call(load(cores, graph))
    state = {"kv": cores.zeros((4, 8), "float32"), "same": cores.put(np.arange(3, dtype=np.int32))}
    emulator.fail_next(1006)
    state, y = call(state, cores.put(np.ones(8, np.float32)))
    later, z = call(state, cores.put(np.ones(8, np.float32)))  # takes what the failed one made
    for result in (y, z):
        with pytest.raises(errors.NrtError, match="1006 .index out of bounds"):
            np.asarray(result)
    with pytest.raises(errors.NrtError):
        later["kv"].block_until_ready()
    again = {"kv": cores.zeros((4, 8), "float32"), "same": cores.put(np.arange(3, dtype=np.int32))}
    np.testing.assert_array_equal(np.asarray(call(again, cores.put(np.ones(8, np.float32)))[1]), 2)


def test_a_tensor_of_another_size_is_named(cores) -> None:
    graph = step()
    call = graph.call(load(cores, graph))
    state = {"kv": cores.zeros((4, 9), "float32"), "same": cores.put(np.arange(3, dtype=np.int32))}
    with pytest.raises(ValueError, match=r"f32\[4, 8\] as state\['kv'\], got float32\[4, 9\]"):
        call(state, cores.put(np.ones(8, np.float32)))


def test_a_neff_with_other_inputs_is_not_run(cores) -> None:
    double = export(lambda x: x * 2, (abstract(5),), Signature("double", ("x",), ("y",)))
    with pytest.raises(errors.NeffInvalid, match="its inputs differ in input1"):
        cores.load(step().exported, container(double.exported.hlo, "double"))
    wide = export(lambda x: x * 2, (abstract(6),), Signature("wide", ("x",), ("y",)))
    with pytest.raises(errors.NeffInvalid, match=r"input0 is no f32\[5\] there"):
        cores.load(double.exported, container(wide.exported.hlo, "wide"))


def test_what_does_not_fit_the_emulated_core_says_what_to_change(cores, emulator) -> None:
    emulator.become(memory=1000)
    with pytest.raises(errors.NrtError, match="4 .out of device memory.*--num-pages"):
        cores.zeros((1000,), "float32")


def test_a_neff_for_other_logical_cores_is_refused(cores, monkeypatch) -> None:
    monkeypatch.setenv("NEURON_LOGICAL_NC_CONFIG", "1")
    exported = step().exported
    with pytest.raises(errors.LncMismatch):
        cores.load(exported, container(exported.hlo, "step", lnc=2))


def test_too_few_cores_and_no_library_are_named(emulator, emulator_library) -> None:
    with pytest.raises(errors.NoNeuronDevice, match="needs 4 cores, and 2 are visible"):
        Cores(str(emulator_library), ranks=4)
    with pytest.raises(errors.NoNeuronDevice, match="/nowhere/libnrt.so.1"):
        Cores("/nowhere/libnrt.so.1")


def test_the_emulated_runtime_tells_what_it_is(cores, emulator) -> None:
    info = cores.nrt.instance()
    assert (info.family, info.arch_name) == (4, b"emulator") and cores.nrt.version() == "2.0.0.0"
    cores.zeros((256,), "float32")
    used, limit = cores.memory()
    assert used >= 1024 and limit == 16 << 30


TWO_RANKS = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AbstractMesh, PartitionSpec as P
from octavo.backends.neuron.export import Signature, export
from octavo.backends.neuron.runner import Cores
from tests.neuron.emulator.host import attach
from tests.neuron.fake_neuronx_cc import container

attach(sys.argv[1])
def local(state, x):  # a column of the weight on each rank
    return state + 1, jax.lax.psum(x @ state, "model")
whole = jax.shard_map(local, mesh=AbstractMesh((2,), ("model",)), check_vma=False,
                      in_specs=(P("model"), P(None, "model")), out_specs=(P("model"), P()))
shapes = (jax.ShapeDtypeStruct((6, 4), jnp.float32), jax.ShapeDtypeStruct((3, 6), jnp.float32))
named = Signature("two", ("state", "x"), ("state", "y"))
graph = export(whole, shapes, named, donate=(0,), ranks=2)
cores = Cores(sys.argv[1], ranks=2)
call = graph.call(cores.load(graph.exported, container(graph.exported.hlo, "two")))
random = np.random.default_rng(0)
weight = random.integers(-4, 4, (6, 4)).astype(np.float32)
x = random.integers(-4, 4, (3, 6)).astype(np.float32)
state = cores.put(weight, axis=0)
for i in range(3):
    state, y = call(state, cores.put(x, axis=1))
    np.testing.assert_array_equal(np.asarray(y), x @ (weight + i))
cores.close()
print("equal")
"""


def test_two_emulated_ranks_meet_in_a_collective(emulator_library) -> None:
    done = subprocess.run(
        [sys.executable, "-c", TWO_RANKS, str(emulator_library)],
        env={
            "PATH": "/usr/bin:/bin",
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
            "PYTHONPATH": str(ROOT),
        },
        capture_output=True,
        text=True,
        timeout=100,
        cwd=ROOT,
    )
    assert done.stdout.endswith("equal\n"), done.stderr[-3000:]


# The headers' declarations, for a C compiler to say where everything lies.
LAYOUT = r"""
#include <stdint.h>
#include <stddef.h>
#include <stdio.h>
typedef struct { char name[256]; enum {A} usage; size_t size; enum {B} dtype; uint32_t *shape;
                 uint32_t ndim; } info;
typedef struct { uint64_t count; info entries[]; } infos;
typedef struct { uint32_t family, size; char arch[16]; char revision[8]; } instance;
typedef struct { size_t used, limit; } memory;
typedef struct { uint64_t a, b, c, d; char detail[128]; char hash[64]; } version;
int main(void) {
    printf("%zu %zu %zu %zu %zu ", sizeof(info), sizeof(infos), sizeof(instance), sizeof(memory),
           sizeof(version));
    printf("%zu %zu %zu %zu %zu %zu", offsetof(info, usage), offsetof(info, size),
           offsetof(info, dtype), offsetof(info, shape), offsetof(info, ndim),
           offsetof(infos, entries));
}
"""


def test_structures_lie_in_memory_as_a_c_compiler_lays_them_out(emulator_library, tmp_path) -> None:
    (tmp_path / "layout.c").write_text(LAYOUT)
    program = tmp_path / "layout"
    subprocess.run(["gcc", "-o", program, tmp_path / "layout.c"], check=True, timeout=60)
    said = subprocess.run([program], capture_output=True, text=True, check=True, timeout=10).stdout
    info = nrt.TensorInfo
    ours = [*nrt.SIZES.values(), info.usage.offset, info.size.offset, info.dtype.offset]
    ours += [info.shape.offset, info.ndim.offset, nrt.TensorInfoArray.first.offset]
    assert [int(n) for n in said.split()] == ours
