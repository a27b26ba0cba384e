"""The checks of `octavo doctor neuron`: what is installed and what runs; probes.py has the rest.

Each takes a `conformance.Bench`, returns what it found, and raises where that is not as it must be.
"""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from time import perf_counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, PartitionSpec

from octavo.backends.neuron import detect, lint, targets
from octavo.backends.neuron.compiler import Options
from octavo.backends.neuron.conformance import Bench, Entry
from octavo.backends.neuron.errors import NeuronError, NrtError
from octavo.backends.neuron.export import Graph, Signature, export
from octavo.backends.neuron.ops import FlatKV, attend
from octavo.backends.neuron.probes import PROBES
from octavo.backends.neuron.runner import Cores
from octavo.backends.neuron.settings import Settings
from octavo.pallas_kernels.attention.batch import RaggedBatch

CHILD_SECONDS = 600
LNC = "NEURON_LOGICAL_NC_CONFIG"
TOLERANCE = 2e-2  # of bfloat16 attention against the host's
S, K, D, H, PAGES, ROWS = 32, 2, 64, 4, 9, 2  # page, key heads, head, query heads, pages, rows


# --- what is installed


def _devices(bench: Bench) -> str:
    if not bench.found.chips and bench.cores is None:
        raise RuntimeError("no device: there is no /dev/neuron0")
    return f"{len(bench.found.chips)} chips, {bench.visible} cores visible"


def _runtime(bench: Bench) -> str:
    if bench.cores is None:
        raise RuntimeError(bench.found.problems.get("libnrt", "libnrt did not start: no device"))
    info = bench.cores.nrt.instance()
    return f"libnrt {bench.cores.nrt.version()}, family {info.family}, {info.arch_name.decode()}"


def _compiler(bench: Bench) -> str:
    if bench.compiler is None:
        raise RuntimeError(bench.found.problems.get("neuronx-cc", "there is none"))
    return bench.compiler.version


def _pin(bench: Bench) -> str:
    if not bench.found.plugin:
        raise RuntimeError(bench.found.problems.get("libneuronxla", "not installed"))
    detect.check_jax(jax.__version__)
    return f"jax {jax.__version__} with libneuronxla {bench.found.plugin}"


_ASK_JAX = """
import jax
from octavo.backends.neuron.executors import donation_works
device = jax.devices("neuron")[0]
print(device.device_kind, "right" if donation_works(device) else "wrong")
"""


def _donation(bench: Bench) -> str:
    """In a process of its own: cores belong to one process, and this one has the runtime."""
    if not bench.found.plugin:
        raise RuntimeError("jax has no neuron platform here")
    taken, bench.cores = bench.cores, None
    if taken is not None:
        taken.close()
    try:
        ask = [sys.executable, "-c", _ASK_JAX]
        child = subprocess.run(
            ask, capture_output=True, text=True, timeout=CHILD_SECONDS, env=_jax_environment(bench)
        )
    finally:
        if taken is not None:
            bench.cores = Cores(Settings.read().libnrt)
    said = child.stdout.strip().splitlines()
    if child.returncode or not said:
        raise RuntimeError((child.stderr.strip().splitlines() or ["no answer"])[-1])
    if not said[-1].endswith("right"):
        raise RuntimeError("donated arrays hold wrong numbers: the engine copies instead")
    return said[-1]


def _jax_environment(bench: Bench) -> dict[str, str]:
    """Of a target whose cores are what they are, without the variable that joins them."""
    joined = bench.target is not None and len(bench.target.lnc) > 1
    return {name: v for name, v in os.environ.items() if joined or name != LNC}


# What the compiler calls some of XLA's operators.
SYNONYMS = {
    "and": "logicaland",
    "convert": "convertelementtype",
    "cosine": "cos",
    "divide": "div",
    "exponential": "exp",
    "maximum": "max",
    "minimum": "min",
    "multiply": "mul",
    "negate": "neg",
    "not": "logicalnot",
    "power": "pow",
    "sine": "sin",
    "subtract": "sub",
}


def _operators(bench: Bench) -> str:
    assert bench.compiler is not None
    listed = bench.compiler.operators()
    known = {re.sub(r"[^a-z0-9]", "", name.lower()) for name in listed}
    missing = [
        name
        for name in sorted(lint.OPERATORS)
        if not {name.replace("-", ""), SYNONYMS.get(name, "")} & known
    ]
    if missing:
        raise RuntimeError(f"{len(listed)} operators, without {', '.join(missing)}")
    return f"{len(listed)} operators, all of Octavo's {len(lint.OPERATORS)} among them"


# --- graphs that are run


def attention() -> tuple[Graph, tuple[Any, ...], Callable[..., Any]]:
    """One decode step of paged attention, its arguments, and the same for the host.

    Row 1 is idle: what it writes goes to page 0.
    """

    def step(cache: FlatKV, q: jax.Array, k: jax.Array, v: jax.Array, batch: RaggedBatch) -> Any:
        y, cache = attend(q, k, v, cache, batch, window=0, scale=D**-0.5, softcap=0.0)
        return cache, y

    random = np.random.default_rng(0)

    def numbers(*shape: int) -> np.ndarray:
        return random.standard_normal(shape, np.float32).astype(jnp.bfloat16)

    cache = FlatKV(k=numbers(PAGES * S, K * D), v=numbers(PAGES * S, K * D))  # type: ignore[arg-type]
    at, none = 3 * S - 5, np.zeros(0, np.int32)
    table = np.zeros((ROWS, 4), np.int32)
    table[0, :3] = 7, 2, 5
    batch: Any = RaggedBatch
    one = batch(
        table=table,
        row_start=np.array([at, 0], np.int32),
        row_count=np.array([1, 0], np.int32),
        chunk_slot=none,
        chunk_start=none,
        chunk_count=none,
        chunk_offset=none,
        dest=np.array([5 * S + at % S, 1], np.int32),
        position=np.array([at, 0], np.int32),
        slot=np.array([0, 1], np.int32),
        real=np.array([True, False]),
        page_size=S,
    )
    arguments = (cache, numbers(ROWS, H, D), numbers(ROWS, K, D), numbers(ROWS, K, D), one)
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), arguments)
    signature = Signature("attention", ("cache", "q", "k", "v", "batch"), ("cache", "y"))
    return export(step, shapes, signature, donate=(0,)), arguments, jax.jit(step)


def _attends(bench: Bench) -> str:
    """Three steps, so that the second and third read what the ones before wrote in place."""
    graph, (cache, *rest), host = attention()
    call, cores = bench.run(graph), bench.cores
    assert cores is not None
    there = jax.tree.map(cores.put, cache)
    others = [jax.tree.map(cores.put, argument) for argument in rest]
    worst = 0.0
    for _ in range(3):
        there, y = call(there, *others)
        cache, wanted = host(cache, *rest)
        found, right = (np.asarray(a)[0].astype(np.float32) for a in (y, wanted))
        worst = max(worst, float(np.max(np.abs(found - right))))
    kept, right = (np.asarray(pool.k)[S:].astype(np.float32) for pool in (there, cache))
    if not np.array_equal(kept, right):
        raise RuntimeError("the cache holds other numbers than were written into it")
    if not worst <= TOLERANCE:
        raise RuntimeError(f"attention differs by {worst:.3g} from the host's")
    return f"largest difference {worst:.2g}, the cache is exact"


def _names(bench: Bench) -> str:
    graph, _, _ = attention()
    bench.run(graph)  # loading compares every name, size and type with the runtime's
    tensors = (*graph.exported.inputs, *graph.exported.outputs)
    return f"{tensors[0].name} to {tensors[-1].name}, with their sizes and types"


def _in_place(bench: Bench) -> str:
    graph, (cache, *rest), _ = attention()
    call, cores = bench.run(graph), bench.cores
    assert cores is not None
    before = jax.tree.map(cores.put, cache)
    handles = [leaf.buffers.handles for leaf in jax.tree.leaves(before)]
    after, y = call(before, *[jax.tree.map(cores.put, argument) for argument in rest])
    np.asarray(y)
    if handles != [leaf.buffers.handles for leaf in jax.tree.leaves(after)]:
        raise RuntimeError("the graph has no aliases for its cache")
    dest = np.asarray(rest[3].dest)[0]
    changed = np.any(np.asarray(after.k) != np.asarray(cache.k), axis=1)
    if set(np.flatnonzero(changed)) - {1} != {int(dest)}:
        raise RuntimeError(f"rows {np.flatnonzero(changed)[:5].tolist()} changed instead of {dest}")
    return "one row of the cache and one of the trash page were written"


def _gather_speed(bench: Bench) -> str:
    pages, width = 2048, S * K * D
    table = jax.ShapeDtypeStruct((pages,), jnp.int32)
    pool = jax.ShapeDtypeStruct((pages, width), jnp.bfloat16)

    def gather(pool: jax.Array, table: jax.Array) -> jax.Array:
        rows = pool.at[table].get(mode="promise_in_bounds", wrap_negative_indices=False)
        return jnp.max(rows, axis=0)

    graph = export(gather, (pool, table), Signature("gather", ("pool", "table"), ("y",)))
    call, cores = bench.run(graph), bench.cores
    assert cores is not None
    order = np.random.default_rng(0).permutation(pages).astype(np.int32)
    there = cores.zeros((pages, width), jnp.bfloat16), cores.put(order)
    np.asarray(call(*there))
    began, times = perf_counter(), 10
    for _ in range(times):
        y = call(*there)
    np.asarray(y)
    rate = times * pages * width * 2 / (perf_counter() - began)
    return f"{rate / 1e9:.1f} GB/s of pages gathered in {width * 2:,}-byte pieces"


def _collective(ranks: int, bench: Bench) -> str:
    def local(x: jax.Array) -> jax.Array:
        return jax.lax.psum(x * 2, "model")

    whole = jax.shard_map(
        local,
        mesh=AbstractMesh((ranks,), ("model",)),
        in_specs=PartitionSpec("model"),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    shape = jax.ShapeDtypeStruct((ranks, 128), jnp.float32)
    graph = export(whole, (shape,), Signature(f"psum_{ranks}", ("x",), ("y",)), ranks=ranks)
    data = bench.cache().get(graph.exported, bench.options())
    if bench.cores is not None:  # one core of it would not let the others be taken
        bench.cores.close()
    try:
        group = Cores(Settings.read().libnrt, ranks)
        try:
            x = np.arange(ranks * 128, dtype=np.float32).reshape(ranks, 128)
            y = graph.call(group.load(graph.exported, data))(group.put(x, axis=0))
            if not np.array_equal(np.asarray(y)[0], 2 * x.sum(0)):
                raise RuntimeError("the sum over the ranks is wrong")
        finally:
            group.close()
    finally:
        bench.cores = Cores(Settings.read().libnrt)
    return f"{ranks} ranks of one module, loaded with their rank"


def _warm(bench: Bench) -> str:
    graph, _, _ = attention()
    cache = bench.cache()
    cache.get(graph.exported, bench.options())
    began = perf_counter()
    cache.get(graph.exported, bench.options())
    if not cache.hits:
        raise RuntimeError("the second request compiled again")
    return f"{(perf_counter() - began) * 1000:.0f} ms"


def _wrong_target(bench: Bench) -> str:
    assert bench.target is not None and bench.cores is not None
    other = targets.target_of("trn2" if bench.target.name in ("inf2", "trn1") else "inf2")
    graph, _, _ = attention()
    data = bench.cache().get(graph.exported, Options(other))
    try:
        bench.cores.load(graph.exported, data)
    except (NrtError, NeuronError) as error:
        return f"a NEFF for {other.name} is refused: {error}"
    raise RuntimeError(f"a NEFF for {other.name} was loaded")


CHECKS: tuple[Entry, ...] = (
    ("devices", _devices, "", True),
    ("runtime", _runtime, "", True),
    ("compiler, not a stub", _compiler, "", False),
    ("jax's plugin, and a jax it was made for", _pin, "", False),
    ("jax's plugin updates donated arrays in place", _donation, "", False),
    ("Octavo's operators are in the compiler's list", _operators, "compiler", False),
    ("paged attention, three steps in place", _attends, 1, True),
    ("only the written rows of the cache change", _in_place, 1, True),
    ("inputs and outputs go by Octavo's names", _names, 1, True),
    ("a second start compiles nothing", _warm, "compiler", True),
    ("a NEFF for other hardware is refused", _wrong_target, 1, False),
    ("collective of 2 cores", partial(_collective, 2), 2, False),
    ("collective of 12 cores", partial(_collective, 12), 12, False),
    ("speed of gathered pages", _gather_speed, 1, False),
    *PROBES,
)
