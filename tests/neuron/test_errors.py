"""All that can go wrong on the way to a Neuron core is raised here, by the code that meets it.

Each reads as one sentence that ends with the next step. What the same errors look like from a
command line stands in test_ahead.py, those of the compiler one by one in test_compiler.py.
"""

import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from octavo.backends.neuron import detect, errors, neff, record, settings, targets
from octavo.backends.neuron.cache import HISTORY, NeffCache
from octavo.backends.neuron.compiler import Compiler, Options
from octavo.backends.neuron.executors import Aot, Pjrt
from octavo.backends.neuron.exported import Exported, TensorInfo
from octavo.backends.neuron.nrt import Nrt
from octavo.engine.config import EngineConfig
from tests.neuron.conftest import FAKE
from tests.neuron.fake_neuronx_cc import container

INF2, TRN1, TRN3 = (targets.target_of(name) for name in ("inf2", "trn1", "trn3"))
GRAPH = Exported("decode", b"what the exporter made", (), (), (), 1)


def stub(module: str) -> Any:
    raise ImportError("WRONG PACKAGE. Please install the package from Neuron Repository")


def nothing(module: str) -> Any:
    raise ModuleNotFoundError(f"No module named {module!r}")


def wide() -> None:
    jax.config.update("jax_enable_x64", True)
    try:
        Pjrt(INF2, tuple(jax.devices("cpu")))
    finally:
        jax.config.update("jax_enable_x64", False)


def broken_graph() -> None:
    """Executor B with a program that sorts."""
    job = SimpleNamespace(
        name="score of a test",
        function=lambda x: (jax.lax.sort(x),),
        arguments=(jax.ShapeDtypeStruct((8, 16), jnp.float32),),
        donate=(),
        tokens=1,
    )
    cores: Any = SimpleNamespace(ranks=1)
    Aot(cores, NeffCache(Path("/nowhere"), None), INF2).compile(job)


def compile_with_fake(folder: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_NEURONX_CC", how)
    NeffCache(folder, Compiler(FAKE, "fake-1", jobs=1)).get(GRAPH, Options(INF2))


def compiled_for(folder: Path, target: targets.Target, here: targets.Target) -> None:
    """Compiled on one machine for `target`, asked for on an instance that is `here`."""
    NeffCache(folder, Compiler(FAKE, "fake-1", jobs=1)).get(GRAPH, Options(target))
    NeffCache(folder, None, require_cached=True).get(GRAPH, Options(here))


def compiled_shorter(folder: Path) -> None:
    """Compiled for sequences of 2,048 tokens, asked for with 8,192."""
    graphs = [
        replace(GRAPH, inputs=(TensorInfo("input0", (1, 5, length), "s32", HISTORY),), hlo=hlo)
        for length, hlo in ((2048, b"short"), (8192, b"long"))
    ]
    NeffCache(folder, Compiler(FAKE, "fake-1", jobs=1)).get(graphs[0], Options(INF2))
    NeffCache(folder, None, require_cached=True).get(graphs[1], Options(INF2))


def runtime(code: int) -> None:
    """A call of the runtime that returns `code`."""
    nrt = object.__new__(Nrt)
    library: Any = SimpleNamespace(nrt_execute=lambda: code)
    nrt._library = library
    nrt._do("nrt_execute")


def variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OCTAVO_NEURON_REQUIRE_CACHED", "maybe")
    settings.Settings.read()


def served(target: targets.Target, **config: Any) -> None:
    """What a start of the engine asks first; a reason is a sentence of the same form."""
    if why := record.why_not(target, EngineConfig(**config)):
        raise errors.NeuronError(*why.rsplit("; ", 1))


# What it is called there: how it is met, and a part of what it says.
Way = Callable[[Path, pytest.MonkeyPatch], object]
ERRORS: dict[str, tuple[Way, str]] = {
    "UnknownTarget": (lambda t, m: targets.target_of("inf1"), "use inf2, trn1, trn2 or trn3"),
    "StubPackage": (
        lambda t, m: detect.package_version("neuronxcc", "neuronx-cc", stub),
        "pip uninstall neuronx-cc",
    ),
    "PackageMissing": (
        lambda t, m: detect.package_version("no_such", "no-such", nothing),
        "docs/neuron.md",
    ),
    "NoNeuronDevice": (
        lambda t, m: detect.require_device(detect.find(t, nothing)),
        "use --device cpu",
    ),
    "JaxPinMismatch": (lambda t, m: detect.check_jax("0.11.1"), "pip install jax==0.10.0"),
    "UnsupportedTP": (
        lambda t, m: targets.check_parallel(INF2, 3, 9),
        "use model=1, 2, 4, 8, 12 or 24",
    ),
    "UnsupportedTP of trn1": (lambda t, m: targets.check_parallel(TRN1, 4, 8), "model=4"),
    "HeadsNotDivisible": (
        lambda t, m: targets.check_parallel(INF2, 8, 12),
        "use model=1, 2, 4 or 12",
    ),
    "UnsupportedDtype": (
        lambda t, m: served(INF2, kv_cache_dtype="fp8"),
        "`kv_cache_dtype` asks for float8_e4m3fn, in which inf2 does not compute; "
        "use --kv-cache-dtype float32, bfloat16 or float16",
    ),
    "UnsupportedDtype of integers": (
        lambda t, m: served(TRN3, kv_cache_dtype="int8"),
        "asks for int8",
    ),
    "NeuronError of a cache of 8 bits": (
        lambda t, m: served(TRN3, kv_cache_dtype="fp8"),
        "got `kv_cache_dtype=fp8`; use --kv-cache-dtype auto",
    ),
    "NeuronError of log probabilities": (
        lambda t, m: served(INF2, max_logprobs=50),
        "use --max-logprobs 20",
    ),
    "X64Enabled": (lambda t, m: wide(), "leave JAX_ENABLE_X64 unset"),
    "SequenceExceedsBuckets": (
        lambda t, m: compiled_shorter(t),
        "`max_model_len` is 8,192, but the longest graph sees 2,048 tokens; "
        "use --max-model-len 2048",
    ),
    "TooManyGraphs": (
        lambda t, m: record.record(INF2, "").check_jobs([SimpleNamespace(name="edit")] * 37),
        "37 graphs, and at most 36 are compiled; use a smaller --max-num-seqs",
    ),
    "LintError": (
        lambda t, m: broken_graph(),
        "N002: sort is no operator of the compiler; write it with others (sort.",
    ),
    "CompilerMissing": (
        lambda t, m: NeffCache(t, None).get(GRAPH, Options(INF2)),
        "OCTAVO_NEURON_REQUIRE_CACHED=1",
    ),
    "CompileFailed": (
        lambda t, m: compile_with_fake(t, "exit:70:NCC_EVRF007", m),
        "exit code 70 (NCC_EVRF007)",
    ),
    "CompileFailed of -9": (
        lambda t, m: compile_with_fake(t, "kill", m),
        "the host ran out of memory: compile on one with 64 GiB or more",
    ),
    "CacheMiss": (
        lambda t, m: NeffCache(t, None, require_cached=True).get(GRAPH, Options(INF2)),
        "run `octavo compile` with the same settings",
    ),
    "NeffInvalid": (lambda t, m: neff.parse(b"short", "model.neff"), "delete it"),
    "NeffTargetMismatch": (
        lambda t, m: compiled_for(t, TRN1, INF2),
        "compiled for trn1, and this instance is inf2; compile with --target inf2",
    ),
    "LncMismatch": (
        lambda t, m: neff.check_lnc(neff.parse(container(b"hlo", "x", lnc=2)), "decode", 1),
        "set NEURON_LOGICAL_NC_CONFIG=2",
    ),
    "NrtError of 4": (lambda t, m: runtime(4), "out of device memory); use fewer --num-pages"),
    "NrtError of 9": (lambda t, m: runtime(9), "another process holds them"),
    "NrtError of 1006": (lambda t, m: runtime(1006), "index out of bounds"),
    "NrtError of a new code": (lambda t, m: runtime(77), "look into the runtime's log"),
    "BadSetting": (lambda t, m: variable(m), "use 1 or 0, or leave it unset"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_is_one_sentence_with_the_next_step(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meet, says = ERRORS[name]
    with pytest.raises((errors.NeuronError, errors.NrtError)) as raised:
        meet(tmp_path, monkeypatch)
    assert type(raised.value).__name__ == name.split()[0]
    text = str(raised.value)
    assert says in text and "; " in text
    assert "\n" not in text and ". " not in text and not text.endswith(".")
    if isinstance(raised.value, errors.NeuronError):
        assert raised.value.hint and text == f"{raised.value.message}; {raised.value.hint}"


def test_no_error_is_left_out() -> None:
    defined = {
        name
        for module in (errors, settings)
        for name, found in inspect.getmembers(module, inspect.isclass)
        if issubclass(found, (errors.NeuronError, errors.NrtError))
    }
    assert defined == {name.split()[0] for name in ERRORS}
