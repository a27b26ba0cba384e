"""Chat completions as the openai package sees them."""

import asyncio
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI, BadRequestError, NotFoundError

from tests.server.conftest import Server

# The package's own types are stricter than its server's: what is sent here is sent on purpose.
HELLO: Any = [{"role": "user", "content": "Hé!"}]
RENDERED = "<user>Hé!<assistant>"  # what the fake engine answers, again and again


def tokens_of(text: str) -> int:
    return len(text.encode())  # the tiny tokenizer has one a byte


def test_an_answer_has_text_usage_and_a_finish_reason(server: Server) -> None:
    answer = server.openai().chat.completions.create(model="tiny", messages=HELLO, max_tokens=21)
    assert answer.choices[0].message.content == RENDERED
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == answer.usage.completion_tokens == tokens_of(RENDERED)
    assert answer.id.startswith("chatcmpl-") and answer.model == "tiny"


def test_a_stream_says_the_role_first_and_the_usage_last(server: Server) -> None:
    stream: Any = server.openai().chat.completions.create(
        model="tiny",
        messages=HELLO,
        max_completion_tokens=30,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    texts = [chunk.choices[0].delta.content for chunk in chunks[:-1]]
    assert "".join(text or "" for text in texts) == (RENDERED * 2).encode()[:30].decode()
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 30


def test_every_chunk_carries_the_usage_when_asked(server: Server) -> None:
    body: Any = {"messages": HELLO, "max_tokens": 5, "stream": True}
    body["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
    lines = server.post("/v1/chat/completions", body).text.splitlines()
    frames = [line for line in lines if line.startswith("data: {") and '"content":"<' in line]
    assert frames and all('"usage":{"prompt_tokens":21' in frame for frame in frames)
    assert lines[-2] == "data: [DONE]"


def test_without_max_tokens_the_answer_takes_what_is_left_of_the_context(server: Server) -> None:
    answer = server.openai().chat.completions.create(model="tiny", messages=HELLO)
    assert answer.usage is not None and answer.usage.total_tokens == 512


def test_a_stop_string_ends_the_answer_before_itself(server: Server) -> None:
    for stream in (False, True):
        answer: Any = server.openai().chat.completions.create(
            model="tiny", messages=HELLO, max_tokens=100, stop="!<as", stream=stream
        )
        if stream:
            chunks = list(answer)
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
            reason = chunks[-1].choices[0].finish_reason
        else:
            text, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
        assert (text, reason) == ("<user>Hé", "stop")


def test_each_choice_of_n_speaks_for_itself(server: Server) -> None:
    client = server.openai()
    answer = client.chat.completions.create(model="tiny", messages=HELLO, n=3, max_tokens=6)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert {choice.message.content for choice in answer.choices} == {"<user>"}
    assert answer.usage is not None and answer.usage.completion_tokens == 18
    texts = {0: "", 1: "", 2: ""}
    stream = client.chat.completions.create(
        model="tiny", messages=HELLO, n=3, max_tokens=6, stream=True
    )
    for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert set(texts.values()) == {"<user>"}


def test_log_probabilities_have_the_shape_of_openai(server: Server) -> None:
    answer = server.openai().chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=2, logprobs=True, top_logprobs=2
    )
    assert answer.choices[0].logprobs is not None
    first, second = answer.choices[0].logprobs.content or []
    assert (first.token, first.bytes, second.token) == ("<", [60], "u")
    assert first.logprob == pytest.approx(-0.5)
    assert [top.token for top in first.top_logprobs] == ["<", "="]


def test_parts_of_text_are_one_message(server: Server) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    two: Any = [{"role": "user", "content": parts}]
    answer = server.openai().chat.completions.create(model="tiny", messages=two, max_tokens=9)
    assert answer.choices[0].message.content == "<user>a\nb"


def test_an_unknown_model_is_a_404(server: Server) -> None:
    with pytest.raises(NotFoundError, match="the model `gpt-9` does not exist"):
        server.openai().chat.completions.create(model="gpt-9", messages=HELLO)


TWICE = {"type": "function", "function": {"name": "f"}}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [TWICE, TWICE]),
        ("thinking_token_budget", 5),
        ("top_logprobs", 2),
        ("stream_options", {"include_usage": True}),
        ("temperature", 3.0),
        ("max_tokens", 0),
        ("n", 0),
        ("top_p", 0.0),
        ("stop", ["a", "b", "c", "d", "e"]),
        ("request_id", "a\nb"),
    ],
)
def test_names_the_field_that_cannot_be_served(server: Server, field: str, value: object) -> None:
    body = {"messages": HELLO, "max_tokens": 5, field: value}
    response = server.post("/v1/chat/completions", body)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["type"]) == (400, 400, "BadRequestError")
    assert error["param"] == field and f"`{field}`" in error["message"]


def test_a_prompt_longer_than_the_context_is_told_with_numbers(server: Server) -> None:
    with pytest.raises(BadRequestError, match="615 tokens, the context is 512"):
        long: Any = [{"role": "user", "content": "x" * 598}]
        server.openai().chat.completions.create(model="tiny", messages=long)


def test_an_engine_error_after_the_first_token_is_a_frame_and_then_done(server: Server) -> None:
    body = {"messages": HELLO, "max_tokens": 9, "stream": True, "cache_salt": "fail"}
    response = server.post("/v1/chat/completions", body)
    frames = response.text.strip().split("\n\n")
    assert response.status_code == 200
    assert '"error":{"message":"it was told to"' in frames[-2] and '"code":500' in frames[-2]
    assert frames[-1] == "data: [DONE]"
    body["stream"] = False
    assert server.post("/v1/chat/completions", body).status_code == 500


async def test_a_client_that_leaves_takes_its_work_along(server: Server) -> None:
    aborted = server.metric('vllm:request_success_total{engine="0",finished_reason="abort"')
    for stream in (True, False):
        body = {"messages": HELLO, "stream": stream}  # about 490 tokens: half a second
        async with httpx.AsyncClient() as client:
            with pytest.raises(httpx.ReadTimeout):
                async with client.stream(
                    "POST", f"{server.url}/v1/chat/completions", json=body, timeout=0.2
                ) as response:
                    async for _ in response.aiter_bytes():
                        raise httpx.ReadTimeout("seen enough")
    await asyncio.to_thread(
        server.until,
        lambda: (
            server.metric('vllm:request_success_total{engine="0",finished_reason="abort"')
            == aborted + 2
        ),
        "nobody aborted",
    )


async def test_many_streams_at_once_are_each_whole(server: Server) -> None:
    client = AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)

    async def one(i: int) -> bool:
        stream = await client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": str(i)}],
            max_tokens=100,
            stream=True,
        )
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
        return text == (f"<user>{i}<assistant>" * 10)[:100]

    assert all(await asyncio.gather(*(one(i) for i in range(64))))
    await client.close()


@pytest.mark.parametrize("field", ["priority", "prompt_logprob_start"])
def test_a_number_that_no_message_can_carry_is_a_400(server: Server, field: str) -> None:
    body = {"messages": HELLO, "max_tokens": 5, field: 10**30}
    response = server.post("/v1/chat/completions", body)
    assert response.status_code == 400
    assert "does not fit in 64 bits" in response.json()["error"]["message"]
