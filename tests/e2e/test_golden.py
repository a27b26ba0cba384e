"""Exact tokens in float32, by every door: Python, command line, endpoint."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from octavo import LLM, AsyncLLM, RequestOutput, SamplingParams, StructuredOutputsParams
from octavo.engine.sampling_params import ParameterError, RequestOutputKind
from tests.e2e.golden import CHAT, COMPLETION, GEMMA, SMALL, Row, need
from tests.e2e.served import end, serve
from tests.server.conftest import Server

FLAGS = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]


def check(output: RequestOutput, row: Row) -> None:
    [completion] = output.outputs
    assert list(completion.token_ids) == row.output_ids
    assert (completion.text, completion.finish_reason) == (row.spoken, row.finish_reason)
    assert len(output.prompt_token_ids or ()) == row.prompt_tokens
    assert output.finished


def test_generate_and_chat(smollm2: LLM) -> None:
    [output] = smollm2.generate(COMPLETION.prompt, COMPLETION.greedy)
    check(output, COMPLETION)
    assert output.prompt_token_ids == COMPLETION.input_ids
    check(smollm2.chat(CHAT.chat, CHAT.greedy)[0], CHAT)
    ids = smollm2.generate({"prompt_token_ids": COMPLETION.input_ids}, COMPLETION.greedy)
    check(ids[0], COMPLETION)


def test_stream_gives_the_same_tokens_in_pieces(smollm2: LLM) -> None:
    for prompt, row in ((COMPLETION.prompt, COMPLETION), (CHAT.chat, CHAT)):
        outputs = list(smollm2.stream(prompt, row.greedy))
        assert [t for o in outputs for t in o.outputs[0].token_ids] == row.output_ids
        assert "".join(o.outputs[0].text for o in outputs) == row.spoken
        assert len(outputs) > 2 and [o.finished for o in outputs[-2:]] == [False, True]


PERSON = StructuredOutputsParams(
    json={
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 6},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "tags": {"type": "array", "items": {"enum": ["a", "b", None, 1.5]}, "maxItems": 3},
        },
        "required": ["name", "age", "tags"],
        "additionalProperties": False,
    },
    disable_any_whitespace=True,
)


def test_a_schema_rules_the_likeliest_text(smollm2: LLM) -> None:
    [output] = smollm2.generate(
        "A person as JSON: ",
        SamplingParams(temperature=0, max_tokens=60, structured_outputs=PERSON),
    )
    assert output.outputs[0].text == '{"name":"John","age":25,"tags":[1.5,1.5,1.5]}'
    assert output.outputs[0].finish_reason == "stop"
    with pytest.raises(ParameterError, match="unclosed group"):
        form = StructuredOutputsParams(regex="(a")
        smollm2.generate("x", SamplingParams(structured_outputs=form))


async def test_async_callers_each_get_their_own() -> None:
    need("smollm2-135m")
    llm = AsyncLLM("smollm2-135m", quiet=True, **SMALL)
    greedy = COMPLETION.greedy.replace(output_kind=RequestOutputKind.CUMULATIVE)
    outputs = [output async for output in llm.generate(COMPLETION.prompt, greedy)]
    check(outputs[-1], COMPLETION)
    assert len(outputs) > 2
    check(await llm.chat(CHAT.chat, CHAT.greedy), CHAT)
    llm.close()


def test_gemma_3_with_its_windows() -> None:
    need("gemma3-270m")
    with LLM("gemma3-270m", quiet=True, **SMALL) as llm:
        [output] = llm.generate(GEMMA.prompt, GEMMA.greedy)
        check(output, GEMMA)
        assert output.prompt_token_ids == GEMMA.input_ids
        assert llm.core.stats().compiles_after_ready == 0


def generate_command(model: str, *words: str) -> dict:
    done = subprocess.run(
        [sys.executable, "-m", "octavo", "generate", model, "--temperature", "0", "--json", *words],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


@pytest.mark.parametrize("row", [COMPLETION, CHAT, GEMMA], ids=lambda row: row.id)
def test_the_command_line(row: Row) -> None:
    need(row.model)
    words = ["--chat"] if row.chat else []
    prompt = row.chat[0]["content"] if row.chat else row.prompt
    limit = ["--max-tokens", str(len(row.output_ids))]
    answer = generate_command(row.model, "--prompt", prompt, *words, *limit, *FLAGS)
    assert answer["outputs"] == [
        {
            "index": 0,
            "text": row.spoken,
            "token_ids": row.output_ids,
            "finish_reason": row.finish_reason,
        }
    ]
    assert len(answer["prompt_token_ids"]) == row.prompt_tokens


def test_the_chat_command_prints_the_answer_as_it_comes() -> None:
    need("smollm2-135m")
    done = subprocess.run(
        [sys.executable, "-m", "octavo", "chat", "smollm2-135m", "--temperature", "0", *FLAGS],
        capture_output=True,
        text=True,
        input=CHAT.chat[0]["content"] + "\n",
    )
    assert (done.returncode, done.stdout.strip()) == (0, CHAT.spoken)


def test_the_endpoint_whole(served: Server) -> None:
    client: Any = served.openai()
    text = client.completions.create(
        model="smollm2-135m", prompt=COMPLETION.prompt, temperature=0, max_tokens=20
    )
    assert (text.choices[0].text, text.choices[0].finish_reason) == (COMPLETION.text, "length")
    assert text.usage.prompt_tokens == 5 and text.usage.completion_tokens == 20
    chat = client.chat.completions.create(model="smollm2-135m", messages=CHAT.chat, temperature=0)
    assert chat.choices[0].message.content == CHAT.spoken
    assert chat.choices[0].finish_reason == "stop"
    assert (chat.usage.prompt_tokens, chat.usage.completion_tokens) == (CHAT.prompt_tokens, 8)


def test_the_endpoint_streamed(served: Server) -> None:
    client: Any = served.openai()
    pieces = client.completions.create(
        model="smollm2-135m", prompt=COMPLETION.prompt, temperature=0, max_tokens=20, stream=True
    )
    texts = [choice.text for chunk in pieces for choice in chunk.choices]
    assert "".join(texts) == COMPLETION.text and len(texts) > 2
    stream: Any = client.chat.completions.create(
        model="smollm2-135m", messages=CHAT.chat, temperature=0, stream=True
    )
    chunks = list(stream)
    deltas = [choice.delta.content or "" for chunk in chunks for choice in chunk.choices]
    assert "".join(deltas) == CHAT.spoken and len(deltas) > 2
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_a_sampled_request_repeats_with_its_seed_whoever_runs_beside_it(smollm2: LLM) -> None:
    seeded = SamplingParams(temperature=1.0, max_tokens=12, seed=7)
    [alone] = smollm2.generate(COMPLETION.prompt, seeded)
    beside = smollm2.generate(
        [COMPLETION.prompt] * 4,
        [seeded, SamplingParams(temperature=1.5, max_tokens=20), seeded, seeded.replace(seed=8)],
    )
    ids = [output.outputs[0].token_ids for output in (alone, *beside)]
    assert ids[0] == ids[1] == ids[3] and ids[4] != ids[0]


def test_the_endpoint_with_gemma_3(tmp_path: Path) -> None:
    need("gemma3-270m")
    server = serve("gemma3-270m", *FLAGS, log=tmp_path / "log")
    try:
        client: Any = server.openai()
        body = {"model": "gemma3-270m", "prompt": GEMMA.prompt, "temperature": 0, "max_tokens": 20}
        text = client.completions.create(**body)
        assert text.choices[0].text == GEMMA.text
        pieces = client.completions.create(**body, stream=True)
        assert "".join(c.text for chunk in pieces for c in chunk.choices) == GEMMA.text
        assert server.metric("octavo:compiles_after_ready_total") == 0
    finally:
        end(server)
