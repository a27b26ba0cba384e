"""`octavo bench gpu` on a tiny shape: its own figures, and another engine's beside them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from octavo.bench import gpu_peer
from octavo.bench.gpu import compare, results
from octavo.bench.workloads import make
from octavo.engine.config import ConfigError
from tests.server.tiny_model import write_tiny_model

# Stands in for vLLM: the few names that are used of it, and no engine behind them.
STAND_IN = """
import time
__version__ = "0.0 (a stand-in)"

class SamplingParams:
    def __init__(self, *, temperature, max_tokens, ignore_eos, detokenize):
        self.max_tokens = max_tokens

class Completion:
    def __init__(self, count):
        self.token_ids = [1] * count

class Result:
    def __init__(self, count):
        self.outputs = [Completion(count)]

class LLM:
    def __init__(self, model, load_format, **settings):
        assert load_format == "dummy" and settings["enable_prefix_caching"] is False
        print("a line of its log")

    def generate(self, prompts, params, use_tqdm):
        assert all(prompt["prompt_token_ids"] for prompt in prompts)
        time.sleep(0.05)
        return [Result(one.max_tokens) for one in params]
"""


@pytest.fixture
def stand_in(tmp_path: Path) -> str:
    package = tmp_path / "site" / "vllm"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(STAND_IN)
    return str(package.parent)


@pytest.fixture
def shape(tmp_path: Path) -> str:
    (tmp_path / "shape").mkdir()
    return str(write_tiny_model(tmp_path / "shape"))


def test_the_other_engine_is_timed_on_the_same_workloads(stand_in: str, shape: str) -> None:
    measured = gpu_peer.measure(stand_in, shape, ["single_stream", "chat_mix"], rounds=2)
    assert measured.version == "0.0 (a stand-in)" and measured.startup > 0
    assert set(measured.seconds) == {"single_stream", "chat_mix"}
    assert all(len(s) == 2 and min(s) >= 0.05 for s in measured.seconds.values())


def test_a_folder_without_it_and_one_that_breaks_say_so(stand_in: str, shape: str) -> None:
    with pytest.raises(ConfigError, match="there is no vllm in"):
        gpu_peer.measure(shape, shape, ["chat_mix"], rounds=1)
    (Path(stand_in) / "vllm" / "__init__.py").write_text("raise RuntimeError('no device')")
    with pytest.raises(ConfigError, match="exit code 1: RuntimeError: no device"):
        gpu_peer.measure(stand_in, shape, ["chat_mix"], rounds=1)


def test_faster_is_more_than_one_whichever_way_a_quantity_counts() -> None:
    assert compare("a", "out tok/s", 0, [200.0], [100.0])[-1].spread.median == 2.0
    assert compare("a", "ms a token", 2, [5.0], [10.0])[-1].spread.median == 2.0
    assert len(compare("a", "s", 2, [5.0], [])) == 1
    load = make("prefill_heavy", 1000)
    out, _, ratio, both, *_ = results(load, [2.0], [3.0])
    assert out.spread.median == 256 * 128 / 2 and ratio.spread.median == pytest.approx(1.5)
    assert both.spread.median == 256 * (1024 + 128) / 2


def test_the_whole_command_prints_both_and_where_the_time_goes(stand_in: str, shape: str) -> None:
    words = [
        "bench",
        "gpu",
        "single_stream",
        "--model",
        shape,
        "--device",
        "cpu",
        "--max-num-seqs",
        "2",
    ]
    words += ["--max-model-len", "512", "--compilation-cache", "none", "--peer", stand_in]
    done = subprocess.run(
        [sys.executable, "-m", "octavo", *words, "--steps"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "times vllm" in done.stdout and "1 rows" in done.stdout
    assert "programs: traced" in done.stdout
    done = subprocess.run(
        [sys.executable, "-m", "octavo", *words, "--json"], capture_output=True, text=True
    )
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert [row["quantity"] for row in rows if row["case"] == "single_stream"] == [
        "ms a token",
        "vllm: ms a token",
        "times vllm",
    ]
