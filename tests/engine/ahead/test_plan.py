"""Plans for TPUs that are not here: numbers and refusals; libtpu is not needed."""

import json
from pathlib import Path

import pytest

from octavo.backends.chips import CHIPS
from octavo.cli.main import main

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}
GiB = 1 << 30


@pytest.fixture
def llama(tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    return str(tmp_path)


def plan(words: list[str], capsys: pytest.CaptureFixture[str]) -> dict:
    assert main(["plan", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_plan_says_what_fits_and_what_bounds_a_step(
    llama: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [llama, "--target", "v6e:1x1", "--max-model-len", "8192", "--max-num-seqs", "16"]
    made = plan(words, capsys)
    memory, (one, every) = made["memory"], made["decode"]
    assert memory["limit"] == CHIPS["v6e"].memory
    assert memory["weights"] == 8_030_261_248 * 2
    head_only = memory["weights"] - 128256 * 4096 * 2  # the embedding is looked up in
    a_token = 2 * 32 * 8 * 128 * 2
    assert one["bytes"] == head_only + 8192 * a_token
    assert every["rows"] == 16
    assert one["seconds"] == pytest.approx(one["bytes"] / 1640e9)
    assert every["tokens_per_second"] == pytest.approx(16 / every["seconds"])


def test_a_topology_is_a_mesh_over_all_its_devices(
    llama: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [llama, "--max-model-len", "8192", "--max-num-seqs", "16"]
    alone = plan([*words, "--target", "v6e:1x1"], capsys)["memory"]
    four = plan([*words, "--target", "v6e:2x2"], capsys)["memory"]
    assert alone["weights"] / 4 <= four["weights"] < alone["weights"] / 3.9
    two = plan([*words, "--target", "tpu7x:1x1x1"], capsys)["memory"]  # a chip is two devices
    assert alone["weights"] / 2 <= two["weights"] < alone["weights"] / 1.9


@pytest.mark.parametrize(
    "target, words, said",
    [
        ("v6e:3x3", [], "v6e has no topology 3x3; write one of v6e:1x1, v6e:2x2"),
        ("v5p", [], "v5p has no topology of its own; write one of v5p:2x2x1"),
        ("v5e:1x1", ["--max-model-len", "4096"], "the model does not fit: 14.96 GiB of weights"),
        ("v6e:2x2", ["--mesh", "model=8"], "`mesh=model=8` needs 8 devices, and 4 are here"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(
    target: str, words: list[str], said: str, llama: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", llama, "--target", target, *words]) == 2
    assert f"error: {said}" in capsys.readouterr().err
