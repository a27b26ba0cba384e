"""SmolLM2 over HTTP through executor B: graphs compiled ahead by the fake neuronx-cc, run by the
emulator of libnrt. tests/neuron/emulator/README.md says what that cannot prove."""

from pathlib import Path

import pytest

from octavo.backends.neuron.settings import Settings
from tests.e2e.golden import COMPLETION as ROW
from tests.e2e.golden import need
from tests.e2e.served import end, serve
from tests.neuron.emulator.host import build

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ("--device", "neuron", "--dtype", "float32", "--max-model-len", "128")
SIZES = ("--max-num-seqs", "1", "--max-num-batched-tokens", "32", "--max-logprobs", "1")


def test_smollm2_is_served_through_the_emulator_of_libnrt(tmp_path, monkeypatch) -> None:
    need("smollm2-135m")
    library = build(tmp_path)
    if library is None:
        pytest.skip("the emulator of libnrt is built with gcc, which is not here")
    for name, value in {
        "OCTAVO_NEURON_EXECUTOR": "aot",
        "OCTAVO_NEURON_LIBNRT": str(library),
        "OCTAVO_NEURON_COMPILER": str(ROOT / "tests" / "neuron" / "fake_neuronx_cc.py"),
        "OCTAVO_NEURON_CACHE": str(tmp_path / "neffs"),
        "PYTHONPATH": str(ROOT),
    }.items():
        monkeypatch.setenv(name, value)

    server = serve("smollm2-135m", *FLAGS, *SIZES, log=tmp_path / "log")
    try:
        body = {"prompt": ROW.prompt, "max_tokens": len(ROW.output_ids), "temperature": 0}
        answer = server.post("/v1/completions", {"model": "smollm2-135m", **body}).json()
        assert answer["choices"][0]["text"] == ROW.spoken, (tmp_path / "log").read_text()
        kept = list(Settings.read().cache.glob("*/inf2/*/model.neff"))
        assert len(kept) >= 8, "every program went through the compiler"
    finally:
        assert end(server) == 0, (tmp_path / "log").read_text()
    assert "Inferentia2" in (tmp_path / "log").read_text()
