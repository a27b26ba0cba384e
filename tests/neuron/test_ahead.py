"""Graphs from a config.json alone: what is written, and what is refused before that."""

import json
from pathlib import Path
from typing import Any

import pytest

from octavo.backends.neuron import hlo, safe
from octavo.backends.neuron.cache import HISTORY
from octavo.cli.main import main
from tests.engine.tiny import LLAMA

FLAGS = ["--max-num-seqs", "1", "--max-num-batched-tokens", "32", "--num-pages", "16"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA))
    return folder


def test_exporting_writes_graphs_their_tensors_and_a_report(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["compile", str(model), "--target", "inf2", "--output", str(out), "--export-only"]
    assert main([*words, *FLAGS, "--max-logprobs", "1", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((out / "report.json").read_text())
    assert report["target"] == "inf2" and report["compiler"] is None
    names = {graph["name"] for graph in report["graphs"]}
    assert {"edit", "greedy_1_rows", "rich_1_rows", "forward_1_rows_32_tokens"} <= names
    for name in names:
        data = (out / "graphs" / f"{name}.hlo.pb").read_bytes()
        ports = json.loads((out / "graphs" / f"{name}.json").read_text())
        main_computation = hlo.Module.parse(data).main
        assert len(main_computation.parameters) == len(ports["inputs"])
    decode = json.loads((out / "graphs" / "forward_1_rows_0_tokens.json").read_text())
    leaves = [tensor["leaf"] for tensor in decode["inputs"]]
    assert "params.layers[1].mlp.down.weight" in leaves
    edit = json.loads((out / "graphs" / "edit.json").read_text())
    assert HISTORY in [tensor["leaf"] for tensor in edit["inputs"]]
    in_place = {decode["outputs"][o]["leaf"] for o, _ in decode["aliases"]}
    assert {"state.kv[0].k", "state.kv[1].v", "state.pages[0].table"} <= in_place


def one_constant(name: str, metadata: bytes) -> bytes:
    """A module of one operation, which came from some line."""
    shape = hlo.Shape("f32").encode()
    constant = hlo.Instruction(1, "constant.1", "constant", shape, metadata=metadata)
    return hlo.Module(name, 1, [hlo.Computation(1, "main", 1, [constant])], []).encode()


def test_names_and_lines_decide_nothing() -> None:
    here, there = one_constant("graph", b"\x1a\x01f"), one_constant("other", b"\x1a\x01g")
    assert here != there
    assert safe.canonical(here) == safe.canonical(there)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--target", "inf2:2x2"], "`--target` inf2 has no topology, got '2x2'"),
        (["--target", "inf2", "--mesh", "model=3"], "`mesh` asks for model=3, which inf2 cannot"),
        (["--target", "inf2", "--mesh", "model=8"], "4 heads cannot be dealt to 8 cores"),
        (["--target", "inf2", "--mesh", "data=2"], "are split along `model` only"),
        (["--target", "trn1", "--max-logprobs", "50"], "at most 20, got `max_logprobs=50`"),
        (["--target", "trn2", "--kv-cache-dtype", "fp8"], "float8_e4m3fn, in which trn2 does not"),
        (["--target", "inf2", "--dtype", "float16"], ""),
    ],
    ids=lambda words: " ".join(words[1:]) if isinstance(words, list) else "",
)
def test_what_a_target_cannot_do_is_refused(
    flags: list[str], message: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = main(["plan", str(model), *flags, *FLAGS])
    error: Any = capsys.readouterr().err
    assert status == (2 if message else 0), error
    assert message in error and ("use " in error) == bool(message)


def test_more_graphs_than_anybody_waits_for_are_refused_before_the_first(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (model / "config.json").write_text(json.dumps(LLAMA | {"max_position_embeddings": 8192}))
    words = ["compile", str(model), "--target", "inf2", "--output", str(tmp_path / "out")]
    sizes = ["--max-num-seqs", "512", "--max-num-batched-tokens", "8192"]
    assert main([*words, *sizes, "--export-only"]) == 2
    error = capsys.readouterr().err
    assert "need 37 graphs, and at most 36 are compiled" in error and "--max-num-seqs" in error
    assert not list((tmp_path / "out").glob("graphs/*"))
