"""What cannot work: one sentence that a person can act on, and exit code 2. Whole messages."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from octavo.cli import main as cli
from octavo.models.sources.builtin import builtin_file
from tests.e2e.golden import need
from tests.e2e.served import ROOT
from tests.models.tiny import make_tiny

FAMILIES = (
    "LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM, Gemma3ForCausalLM, "
    "Gemma3ForConditionalGeneration, Phi3ForCausalLM, MixtralForCausalLM, Qwen3MoeForCausalLM, "
    "BertModel, RobertaModel, XLMRobertaModel"
)


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What `octavo generate ...` prints when it exits with 2."""
    capsys.readouterr()
    assert cli.main(["generate", "--prompt", "hi", "--device", "cpu", *words]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    return shown.err


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("llama"))


def test_a_name_that_is_no_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert refusal(capsys, "smollm3") == (
        "error: `smollm3` is not there: give a folder, a .gguf file, a repository as in "
        "organization/model, or a built-in name (smollm2-135m, gemma3-270m, "
        "all-minilm-l6-v2)\n"
    )


def test_a_safetensors_file_that_was_cut_off(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(llama, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1000])
    shown = refusal(capsys, str(tmp_path))
    assert shown == (
        f"error: `{file}` is cut off: tensor `model.layers.1.self_attn.v_proj.weight` ends at "
        f"byte {len(whole) - 128} and the file has {len(whole) - 1000}: download it again\n"
    )
    file.write_bytes(whole[:8] + b"}garbage" + whole[16:])
    assert refusal(capsys, str(tmp_path)) == (
        f"error: `{file}` is not a whole safetensors file: download it again\n"
    )


def test_a_gguf_file_that_was_cut_off(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    need("smollm2-135m")
    with builtin_file("smollm2-135m").open("rb") as stream:
        start = stream.read(8_000_000)
    file = tmp_path / "model.gguf"
    file.write_bytes(start)
    assert refusal(capsys, str(file)) == (
        f"error: `{file}` is cut off: tensor `token_embd.weight` ends at byte 31866688 "
        "and the file has 8000000: download it again\n"
    )
    file.write_bytes(start[:100_000])
    assert refusal(capsys, str(file)) == (
        f"error: `{file}` is damaged or cut off near byte 1107 of 100000: download it again\n"
    )
    file.write_bytes(b"hello")
    assert refusal(capsys, str(file)) == (
        f"error: `{file}` is not a GGUF file: it does not begin with `GGUF`\n"
    )


def test_a_family_that_nobody_knows(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(llama, tmp_path, dirs_exist_ok=True)
    change_config(tmp_path, architectures=["Foo"], model_type="foo")
    assert refusal(capsys, str(tmp_path)) == (
        f"error: unknown model architecture 'Foo'; supported are {FAMILIES}\n"
    )


def test_the_server_refuses_an_unknown_family_in_the_same_words(
    llama: Path, tmp_path: Path
) -> None:
    shutil.copytree(llama, tmp_path, dirs_exist_ok=True)
    change_config(tmp_path, architectures=["Foo"], model_type="foo")
    done = subprocess.run(
        [sys.executable, "-m", "octavo", "serve", str(tmp_path), "--port", "0"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (f"error: unknown model architecture 'Foo'; supported are {FAMILIES}\n")


def blurred(text: str) -> str:
    """Free memory and workspace are not of this test: the rest of a message is exact."""
    return re.sub(r"[\d.]+ (?=GiB usable|GiB on cpu|MiB of workspace)", "N ", text)


def change_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_model_that_does_not_fit(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny, tmp_path, dirs_exist_ok=True)
    change_config(tmp_path, hidden_size=16384, num_hidden_layers=126, intermediate_size=53248)
    change_config(tmp_path, num_attention_heads=128, max_position_embeddings=4096)
    shown = refusal(capsys, str(tmp_path), "--load-format", "dummy", "--dtype", "bfloat16")
    assert blurred(shown) == (
        "error: the model does not fit: 866.27 GiB of weights and N MiB of workspace leave "
        "0 B of the N GiB usable (N GiB on cpu), and one sequence of 4,096 tokens needs 31.62 GiB "
        "of cache\nhint: a smaller model, or a larger device\n"
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--max-tokens", "0"],
            "error: `max_tokens` must be at least 1, got 0\n"
            "hint: octavo generate --help lists the sampling flags\n",
        ),
        (
            ["--max-tokens", "-3"],
            "error: `max_tokens` must be at least 1, got -3\n"
            "hint: octavo generate --help lists the sampling flags\n",
        ),
        (
            ["--max-model-len", "1024"],
            "error: `max_model_len` is 1,024, but the model was trained for 512; "
            "use --max-model-len 512\n",
        ),
        (
            ["--num-pages", "3", "--max-model-len", "512"],
            "error: `num_pages` is 3, but one sequence of 512 tokens needs at least 33, the page "
            "that takes padding included\nhint: use a larger --num-pages or a smaller "
            "--max-model-len; 0 takes what memory allows\n",
        ),
    ],
)
def test_a_setting_that_cannot_work(
    words: list[str], message: str, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = refusal(capsys, str(tiny), "--load-format", "dummy", *words)
    assert blurred(shown) == message


def test_prompts_that_cannot_work(tiny: Path) -> None:
    from octavo import LLM, SamplingParams

    with LLM(str(tiny), load_format="dummy", quiet=True, max_model_len=32, max_num_seqs=2) as llm:
        for prompt, message in (
            (
                "a" * 40,
                "`prompt` has 40 tokens, the context is 32: shorten it by 9, "
                "or start with a larger --max-model-len",
            ),
            ("", "`prompt` must hold at least one token, got none"),
            ([5, 300], "`prompt` has token id 300, the vocabulary is 0 to 258"),
            ([-1], "`prompt` has token id -1, the vocabulary is 0 to 258"),
            ({"text": "a"}, 'a prompt needs "prompt" (text) or "prompt_token_ids" (a list)'),
        ):
            with pytest.raises(ValueError) as caught:
                llm.generate(["fine", prompt], SamplingParams(max_tokens=2))
            assert str(caught.value) == message
        [output] = llm.generate("a" * 31, SamplingParams(max_tokens=5, ignore_eos=True))
        assert len(output.outputs[0].token_ids) == 1  # the context is full
        assert llm.core.stats().running == llm.core.stats().waiting == 0
