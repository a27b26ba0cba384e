"""Other ways to start and to stop: dummy weights, Orbax, YAML, batches, two engines, close."""

import gc
import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from octavo import LLM, SamplingParams
from tests.e2e.golden import CHAT, COMPLETION, SMALL, need
from tests.server.conftest import Server


def octavo_command(*words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-m", "octavo", *words], capture_output=True, text=True)


def test_random_weights_come_from_a_config_alone(tiny: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text((tiny / "config.json").read_text())
    with LLM(str(config), load_format="dummy", quiet=True, max_num_seqs=2) as llm:
        params = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
        [one] = llm.generate([5, 6, 7], params)
        assert len(one.outputs[0].token_ids) == 6
        with pytest.raises(ValueError) as caught:
            llm.generate("text", params)
        assert "no tokenizer" in str(caught.value)
        [again] = llm.generate([5, 6, 7], params)
        assert again.outputs[0].token_ids == one.outputs[0].token_ids


def test_a_model_saved_once_starts_again_with_the_same_tokens(smollm2: LLM, tmp_path: Path) -> None:
    folder = smollm2.save(tmp_path / "saved")
    with LLM(str(folder), quiet=True, **SMALL) as llm:
        [output] = llm.generate(COMPLETION.prompt, COMPLETION.greedy)
        assert output.outputs[0].token_ids == COMPLETION.output_ids
        [output] = llm.chat(CHAT.chat, CHAT.greedy)
        assert output.outputs[0].token_ids == CHAT.output_ids
        assert llm.core.stats().compiles_after_ready == 0


def test_a_settings_file_is_the_same_as_flags(tiny: Path, tmp_path: Path) -> None:
    settings = tmp_path / "settings.yaml"
    settings.write_text(f"model: {tiny}\nload-format: dummy\nmax_num_seqs: 2\nmax_model_len: 16\n")
    words = ["generate", "--config", str(settings), "--prompt", "abc", "--json"]
    done = octavo_command(*words, "--max-tokens", "40", "--temperature", "0")
    assert (done.returncode, done.stderr) == (0, "")
    ids = json.loads(done.stdout)["outputs"][0]["token_ids"]
    flags = ["--load-format", "dummy", "--max-num-seqs", "2", "--max-model-len", "16"]
    typed = octavo_command("generate", str(tiny), *flags, *words[3:], "--max-tokens", "40")
    assert len(ids) <= 13 and typed.returncode == 0


def test_the_plan_says_what_fits_before_anything_is_loaded(tiny: Path) -> None:
    flags = ["--load-format", "dummy", "--max-num-seqs", "2", "--max-model-len", "64"]
    done = octavo_command("plan", "--model", str(tiny), *flags)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    names = ["device", "weights", "cache", "state", "workspace", "total", "fits"]
    assert [line.split()[0] for line in lines] == names
    assert lines[-1] == "fits 2 sequences of 64 tokens, or 2 of 64"
    plan = json.loads(octavo_command("plan", "--model", str(tiny), *flags, "--json").stdout)
    assert plan["max_model_len"] == 64 and plan["pages"] == [9]


def test_a_batch_file_is_answered_line_by_line(tiny: Path, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    chat = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
    lines = [("/v1/chat/completions", chat), ("/v1/completions", {"prompt": "a", "max_tokens": -1})]
    source.write_text(
        "".join(
            json.dumps({"custom_id": str(i), "method": "POST", "url": url, "body": body}) + "\n"
            for i, (url, body) in enumerate(lines)
        )
    )
    flags = ["--load-format", "dummy", "--max-num-seqs", "2"]
    done = octavo_command("run-batch", str(tiny), "-i", str(source), "-o", str(target), *flags)
    good, bad = (json.loads(line) for line in target.read_text().splitlines())
    assert good["custom_id"] == "0" and good["response"]["status_code"] == 200
    assert good["response"]["body"]["usage"]["completion_tokens"] <= 4
    assert bad["error"]["message"] == "HTTP 400: `max_tokens` must be at least 1, got -1"
    assert done.returncode == 1
    assert done.stderr.endswith(f"2 answers in {target}, 1 of them errors\n")


def test_a_batch_file_is_answered_by_a_running_server(served: Server, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    body = {"messages": CHAT.chat, "temperature": 0}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}
    source.write_text(json.dumps(line))
    words = ["--url", served.url, "-i", str(source), "-o", str(target)]
    assert octavo_command("run-batch", *words).returncode == 0
    answer = json.loads(target.read_text())["response"]["body"]
    assert answer["choices"][0]["message"]["content"] == CHAT.spoken


def test_two_engines_live_in_one_process(smollm2: LLM, tiny: Path) -> None:
    greedy = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    first = smollm2.stream(COMPLETION.prompt, COMPLETION.greedy)
    ids = list(next(first).outputs[0].token_ids)
    with LLM(str(tiny), load_format="dummy", quiet=True, max_num_seqs=2) as other:
        [alone] = other.generate([5, 6], greedy)
        for output in first:
            ids += output.outputs[0].token_ids
            [beside] = other.generate([5, 6], greedy)
            assert beside.outputs[0].token_ids == alone.outputs[0].token_ids
        assert other.core.stats().compiles_after_ready == 0
    assert ids == COMPLETION.output_ids
    [output] = smollm2.generate(COMPLETION.prompt, COMPLETION.greedy)
    assert output.outputs[0].token_ids == COMPLETION.output_ids


def live_bytes() -> int:
    gc.collect()
    return sum(array.nbytes for array in jax.live_arrays())


def test_close_frees_what_the_engine_took(tiny: Path) -> None:
    def use() -> None:
        llm = LLM(str(tiny), load_format="dummy", quiet=True, max_num_seqs=2)
        llm.generate([5, 6], SamplingParams(max_tokens=3))
        stream = llm.stream([5, 6], SamplingParams(max_tokens=300, ignore_eos=True))
        next(stream)  # left in the middle: closing ends it
        llm.close()
        llm.close()
        with pytest.raises(RuntimeError, match="was closed; make a new one"):
            llm.generate([5, 6])

    before = live_bytes()
    use()
    assert live_bytes() == before


def test_the_doctor_knows_the_models_and_the_machine() -> None:
    need("smollm2-135m")
    done = octavo_command("doctor")
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert any(line.startswith("ok    smollm2-135m") for line in done.stdout.splitlines())
