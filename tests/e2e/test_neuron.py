"""SmolLM2 over HTTP through executor B, as an inf2.xlarge would have it.

`octavo compile` runs with the fake neuronx-cc; then a server without any compiler runs on the
emulator of libnrt. tests/neuron/emulator/README.md says what that cannot prove.
"""

import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.e2e.golden import COMPLETION as ROW
from tests.e2e.golden import need
from tests.e2e.served import end, serve
from tests.neuron.emulator.host import build

ROOT = Path(__file__).resolve().parents[2]
MODEL = "smollm2-135m"
SIZES = ("--dtype", "float32", "--max-model-len", "128", "--max-num-seqs", "1")
MORE = ("--max-num-batched-tokens", "32", "--max-logprobs", "1", "--num-pages", "6")


def test_smollm2_is_compiled_elsewhere_and_served_through_the_emulator_of_libnrt(
    tmp_path, monkeypatch
) -> None:
    need(MODEL)
    library = build(tmp_path)
    if library is None:
        pytest.skip("the emulator of libnrt is built with gcc, which is not here")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    fake = ROOT / "tests" / "neuron" / "fake_neuronx_cc.py"
    monkeypatch.setenv("OCTAVO_NEURON_COMPILER", str(fake))
    neffs = tmp_path / "neffs"
    command = [sys.executable, "-m", "octavo", "compile", MODEL, *SIZES, *MORE]
    command += ["--target", "inf2", "--output", str(neffs)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    for name, value in {
        "OCTAVO_NEURON_COMPILER": "/nowhere/neuronx-cc",
        "OCTAVO_NEURON_CACHE": str(neffs),
        "OCTAVO_NEURON_REQUIRE_CACHED": "1",
        "OCTAVO_NEURON_EXECUTOR": "aot",
        "OCTAVO_NEURON_LIBNRT": str(library),
    }.items():
        monkeypatch.setenv(name, value)
    log = tmp_path / "log"
    server = serve(MODEL, "--device", "neuron", *SIZES, *MORE, log=log)
    try:
        body = {"prompt": ROW.prompt, "max_tokens": len(ROW.output_ids), "temperature": 0}
        url = f"{server.url}/v1/completions"  # the emulator compiles a graph when it first runs
        answer = httpx.post(url, json={"model": MODEL, **body}, timeout=200).json()
        assert answer["choices"][0]["text"] == ROW.spoken, log.read_text()
    finally:
        assert end(server) == 0, log.read_text()
    assert "Inferentia2" in log.read_text()
