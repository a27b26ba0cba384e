"""The contract with neuronx-cc, against a fake of it: how it is called, not what it makes."""

import json
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import pytest

from octavo.backends.neuron import errors
from octavo.backends.neuron.cache import NeffCache
from octavo.backends.neuron.compiler import Compiler, Options
from octavo.backends.neuron.exported import Exported
from octavo.backends.neuron.hlo import Computation, Instruction, Module, Shape
from octavo.backends.neuron.targets import target_of
from tests.neuron.conftest import FAKE

INF2 = Options(target_of("inf2"))
GRAPH = Exported("decode", b"what the exporter made", (), (), (), 1)


@pytest.fixture
def cache(fake: Compiler, tmp_path: Path) -> NeffCache:
    return NeffCache(tmp_path / "neffs", fake)


def called(calls: Path) -> list[dict]:
    return [json.loads(line) for line in calls.read_text().splitlines()]


def test_the_fake_compiler_gets_the_documented_command_line(cache, calls) -> None:
    made = cache.get(GRAPH, INF2)
    (call,) = called(calls)
    argv, folder = call["argv"], call["cwd"]
    assert argv[0] == "compile" and argv[1] == f"{folder}/model.hlo.pb"
    at = argv.index("--target")
    assert argv[at + 1] == "inf2" and "--lnc" not in argv
    assert argv[argv.index("--output") + 1] == f"{folder}/model.neff"
    assert GRAPH.hlo in made
    assert not Path(folder).exists(), "its litter goes with the folder"
    assert Path.cwd() != Path(folder)


def test_trainium2_is_told_its_logical_cores(cache, calls) -> None:
    cache.get(GRAPH, Options(target_of("trn2")))
    argv = called(calls)[0]["argv"]
    assert argv[argv.index("--lnc") + 1] == "2"


def test_a_graph_is_compiled_once_and_kept_whole(cache, calls) -> None:
    first, second = cache.get(GRAPH, INF2), cache.get(GRAPH, INF2)
    assert first == second and len(called(calls)) == 1 and (cache.hits, cache.misses) == (1, 1)
    (folder,) = (cache.root / "fake-1" / "inf2").glob("*/")
    kept = sorted(p.name for p in folder.iterdir())
    assert kept == ["log", "manifest.json", "model.hlo.pb", "model.neff"]
    assert json.loads((folder / "manifest.json").read_text())["target"] == "inf2"


@pytest.mark.parametrize(
    "graph, options",
    [
        (replace(GRAPH, hlo=b"another program"), INF2),
        (replace(GRAPH, ranks=2), INF2),
        (replace(GRAPH, aliases=((0, 1),)), INF2),
        (GRAPH, replace(INF2, optlevel=1)),
        (GRAPH, replace(INF2, extra=("--enable-fast-loading-neuron-binaries",))),
        (GRAPH, Options(target_of("trn1"))),
    ],
)
def test_a_changed_flag_or_graph_is_another_entry(cache, calls, graph, options) -> None:
    cache.get(GRAPH, INF2)
    cache.get(graph, options)
    assert len(called(calls)) == 2


def test_another_compiler_compiles_again(cache, calls) -> None:
    cache.get(GRAPH, INF2)
    NeffCache(cache.root, Compiler(FAKE, "fake-2")).get(GRAPH, INF2)
    assert len(called(calls)) == 2


def test_a_machine_without_a_compiler_takes_what_another_compiled(cache, calls) -> None:
    made = cache.get(GRAPH, INF2)
    without = NeffCache(cache.root, None, require_cached=True)
    assert without.get(GRAPH, INF2) == made
    with pytest.raises(errors.CacheMiss, match="octavo compile"):
        without.get(replace(GRAPH, hlo=b"never compiled"), INF2)
    with pytest.raises(errors.CompilerMissing, match="OCTAVO_NEURON_REQUIRE_CACHED"):
        NeffCache(cache.root, None).get(replace(GRAPH, hlo=b"never compiled"), INF2)


@pytest.mark.parametrize(
    "how, code, says",
    [
        ("exit:1:", "", "exit code 1"),
        ("exit:70:ERROR: [NCC_EVRF007] too many", "NCC_EVRF007", "too many instructions"),
        ("exit:1:[NCC_EOOM002] HBM", "NCC_EOOM002", "do not fit the core"),
        ("exit:1:NCC_ITEN404 Internal", "NCC_ITEN404", "report it with the log"),
        ("kill", "", "64 GiB"),
        ("partial", "", "instead of"),
        ("nothing", "", "wrote no model.neff"),
    ],
)
def test_a_failure_of_the_fake_compiler_says_what_to_do(
    cache, monkeypatch, how, code, says
) -> None:
    monkeypatch.setenv("FAKE_NEURONX_CC", how)
    with pytest.raises(errors.CompileFailed) as failed:
        cache.get(GRAPH, INF2)
    assert failed.value.code == code and says in str(failed.value)
    assert failed.value.log.exists() and "\n" not in str(failed.value)


def test_a_refused_graph_is_not_tried_again_until_asked(cache, calls, monkeypatch) -> None:
    monkeypatch.setenv("FAKE_NEURONX_CC", "exit:70:NCC_EVRF007")
    for _ in range(2):
        with pytest.raises(errors.CompileFailed, match="NCC_EVRF007"):
            cache.get(GRAPH, INF2)
    assert len(called(calls)) == 1
    monkeypatch.setenv("FAKE_NEURONX_CC", "ok")
    cache.retry_failed = True
    cache.get(GRAPH, INF2)
    cache.retry_failed = False
    cache.get(GRAPH, INF2)
    assert len(called(calls)) == 2, "the mark went with the success"


@pytest.mark.parametrize("how", ["kill", "partial", "slow:30"])
def test_a_compiler_that_was_stopped_is_tried_again(cache, calls, monkeypatch, how) -> None:
    cache.compiler = Compiler(FAKE, "fake-1", time_limit=2.0, jobs=2)
    monkeypatch.setenv("FAKE_NEURONX_CC", how)
    with pytest.raises(errors.CompileFailed):
        cache.get(GRAPH, INF2)
    monkeypatch.setenv("FAKE_NEURONX_CC", "ok")
    cache.get(GRAPH, INF2)
    assert len(called(calls)) == 2


def test_a_slow_compiler_is_ended_and_the_limit_named(cache, monkeypatch) -> None:
    cache.compiler = Compiler(FAKE, "fake-1", time_limit=0.5, jobs=2)
    monkeypatch.setenv("FAKE_NEURONX_CC", "slow:30")
    with pytest.raises(errors.CompileFailed, match="OCTAVO_NEURON_COMPILE_TIMEOUT"):
        cache.get(GRAPH, INF2)


def test_a_compiler_that_does_not_exist_is_named(tmp_path) -> None:
    cache = NeffCache(tmp_path, Compiler(["/nowhere/neuronx-cc"], "1"))
    with pytest.raises(errors.CompileFailed, match="/nowhere/neuronx-cc"):
        cache.get(GRAPH, INF2)


def _compile(root: str) -> int:
    return len(NeffCache(Path(root), Compiler(FAKE, "fake-1", jobs=2)).get(GRAPH, INF2))


def test_two_processes_compile_a_graph_once(tmp_path, calls, monkeypatch) -> None:
    monkeypatch.setenv("FAKE_NEURONX_CC", "slow:0.5")
    with get_context("spawn").Pool(2) as pool:
        sizes = pool.map(_compile, [str(tmp_path / "neffs")] * 2, chunksize=1)
    assert sizes[0] == sizes[1] and len(called(calls)) == 1


def test_a_graph_that_was_compiled_for_other_hardware_is_named(cache) -> None:
    cache.get(GRAPH, Options(target_of("trn1")))
    without = NeffCache(cache.root, None, require_cached=True)
    with pytest.raises(errors.NeffTargetMismatch, match="for trn1.*--target inf2"):
        without.get(GRAPH, INF2)


def test_where_operations_come_from_does_not_decide_the_entry(cache) -> None:
    module = Module("m", 1, [Computation(1, "main", 2, [])], [])
    keys = set()
    for metadata, frames in ((b"", b""), (b"\x10\x05", b"\x0a\x01a")):
        operation = Instruction(2, "p", "parameter", Shape("f32", (3,)).encode())
        operation.metadata, module.frames = metadata, frames
        module.computations[0].instructions = [operation]
        keys.add(cache.key(replace(GRAPH, hlo=module.encode()), INF2))
    operation.parameter = 1
    assert cache.key(replace(GRAPH, hlo=module.encode()), INF2) not in keys and len(keys) == 1


def test_a_half_written_neff_is_not_loaded(cache) -> None:
    cache.get(GRAPH, INF2)
    (kept,) = cache.root.glob("fake-1/inf2/*/model.neff")
    kept.write_bytes(kept.read_bytes()[:2000])
    with pytest.raises(errors.NeffInvalid, match="delete it and compile again"):
        cache.get(GRAPH, INF2)
