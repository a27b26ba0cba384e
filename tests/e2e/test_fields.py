"""Every field of sampling over HTTP, with the effect that it has on SmolLM2."""

from typing import Any

import openai
import pytest

from tests.e2e.golden import CHAT, COMPLETION
from tests.server.conftest import Server

MODEL = "smollm2-135m"
PARIS = COMPLETION.output_ids[0]
LONG = "Once upon a time there was a king who had three daughters, and the youngest of them"


@pytest.fixture
def ask(served: Server) -> Any:
    """Asks for a completion, greedy unless told otherwise; fields go as they are."""

    def ask(prompt: Any = COMPLETION.prompt, **fields: Any) -> Any:
        fields = {"max_tokens": 12, "temperature": 0, **fields}
        streams = fields.pop("stream", None)
        create: Any = served.openai().completions.create
        return create(model=MODEL, prompt=prompt, extra_body=fields, stream=streams)

    return ask


def text_of(answer: Any) -> str:
    return answer.choices[0].text


def test_what_leaves_one_token_is_greedy_at_any_temperature(ask: Any) -> None:
    greedy = text_of(ask())
    for field in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-6}):
        assert text_of(ask(**{"temperature": 2.0, "seed": 1, **field})) == greedy, field


def test_a_seed_repeats_and_another_differs(ask: Any) -> None:
    hot = {"temperature": 1.5, "max_tokens": 24}
    first, again = (text_of(ask(**hot, seed=11)) for _ in range(2))
    assert first == again
    assert len({text_of(ask(**hot, seed=seed)) for seed in range(3)}) == 3
    streamed = "".join(text_of(chunk) for chunk in ask(**hot, seed=11, stream=True))
    assert streamed == first


def test_tokens_are_forced_forbidden_and_allowed(ask: Any) -> None:
    assert text_of(ask(max_tokens=1)) == " Paris"
    assert text_of(ask(max_tokens=1, logit_bias={str(PARIS): -100})) != " Paris"
    assert text_of(ask(LONG, max_tokens=3, logit_bias={str(PARIS): 100})) == " Paris" * 3
    assert text_of(ask(LONG, max_tokens=3, allowed_token_ids=[PARIS])) == " Paris" * 3
    assert " Paris" not in text_of(ask(bad_words=["Paris"]))


@pytest.mark.parametrize(
    "field", [{"presence_penalty": 2.0}, {"frequency_penalty": 2.0}, {"repetition_penalty": 1.8}]
)
def test_penalties_keep_from_repeating(ask: Any, field: dict[str, float]) -> None:
    long = {"max_tokens": 64, "ignore_eos": True, "return_token_ids": True}

    def repeated(answer: Any) -> int:
        ids = answer.choices[0].token_ids
        return len(ids) - len(set(ids))

    plain = repeated(ask(LONG, **long))
    assert plain > 12
    assert repeated(ask(LONG, **long, **field)) < plain


def test_a_stop_string_across_tokens_is_held_back(ask: Any) -> None:
    whole = text_of(ask())
    stop = "s.\n\nThe"  # begins within a token and ends three later
    assert stop in whole
    for stream in (False, True):
        answer = ask(stop=[stop, "never"], stream=stream)
        chunks = list(answer) if stream else [answer]
        assert "".join(map(text_of, chunks)) == " Pari"
        assert chunks[-1].choices[0].finish_reason == "stop"
        assert chunks[-1].choices[0].stop_reason == stop
    kept = ask(stop=stop, include_stop_str_in_output=True)
    assert text_of(kept) == " Paris.\n\nThe"


def test_the_end_can_be_put_off_or_brought_forward(ask: Any) -> None:
    prompt = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    ended = ask(prompt, max_tokens=30)
    assert (ended.choices[0].finish_reason, text_of(ended)) == ("stop", CHAT.spoken)
    assert text_of(ask(prompt, max_tokens=30, skip_special_tokens=False)) != ""
    for field in ({"ignore_eos": True}, {"min_tokens": 30}):
        longer = ask(prompt, max_tokens=30, **field)
        assert longer.usage.completion_tokens == 30
        assert longer.choices[0].finish_reason == "length"
    early = ask(stop_token_ids=[COMPLETION.output_ids[1]])
    assert early.choices[0].stop_reason == COMPLETION.output_ids[1]
    assert early.usage.completion_tokens == 2


def test_n_choices_each_have_their_own_text(ask: Any) -> None:
    answer = ask(n=3, temperature=1.5, seed=5)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.text for choice in answer.choices}) == 3
    assert answer.usage.completion_tokens <= 36
    texts = ["", "", ""]
    for chunk in ask(n=3, temperature=1.5, seed=5, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in answer.choices]


def test_log_probabilities_of_tokens_and_prompt(ask: Any, served: Server) -> None:
    rows = ask(logprobs=2, max_tokens=3).choices[0].logprobs
    assert rows.tokens[0] == " Paris" and len(rows.top_logprobs[0]) == 2
    assert rows.top_logprobs[0][" Paris"] == rows.token_logprobs[0] <= 0
    assert rows.text_offset == [0, 6, 7]
    prompt = ask(prompt_logprobs=1, max_tokens=1).choices[0].prompt_logprobs
    assert prompt[0] is None and len(prompt) == COMPLETION.prompt_tokens
    assert str(COMPLETION.input_ids[1]) in prompt[1]
    as_ids = ask(logprobs=1, max_tokens=1, return_tokens_as_token_ids=True)
    assert as_ids.choices[0].logprobs.tokens == [f"token_id:{PARIS}"]
    chat: Any = served.openai().chat.completions.create
    body = {"model": MODEL, "messages": CHAT.chat, "max_tokens": 3, "temperature": 0}
    wanted = {"logprobs": True, "top_logprobs": 2}
    content = chat(**body, **wanted).choices[0].logprobs.content
    streamed: list[Any] = []
    for chunk in chat(**body, **wanted, stream=True):
        if chunk.choices and chunk.choices[0].logprobs:
            streamed += chunk.choices[0].logprobs.content
    assert [row.token for row in content] == [row.token for row in streamed]
    assert [len(row.top_logprobs) for row in content] == [2, 2, 2]


def test_log_probabilities_come_with_a_response(served: Server) -> None:
    create: Any = served.openai().responses.create
    body = {"model": MODEL, "input": CHAT.chat[0]["content"], "temperature": 0}
    wanted: Any = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    response = create(**body, **wanted, max_output_tokens=4)
    rows = response.output[0].content[0].logprobs
    assert "".join(row.token for row in rows) == response.output_text
    assert [len(row.top_logprobs) for row in rows] == [2] * 4


def test_token_ids_come_back(ask: Any) -> None:
    wanted = {"return_token_ids": True, "max_tokens": 5}
    [choice] = ask(**wanted).choices
    assert choice.token_ids == COMPLETION.output_ids[:5]
    assert choice.prompt_token_ids == COMPLETION.input_ids
    chunks = list(ask(**wanted, stream=True))
    ids = [t for chunk in chunks for c in chunk.choices for t in c.token_ids or ()]
    assert ids == COMPLETION.output_ids[:5]


def test_usage_comes_when_asked_and_counts_what_the_cache_had(ask: Any) -> None:
    salt = {"cache_salt": "usage"}
    prompt = " ".join([LONG] * 4)
    first, again = (ask(prompt, max_tokens=1, **salt).usage for _ in range(2))
    assert first.prompt_tokens_details is None or first.prompt_tokens_details.cached_tokens == 0
    assert 0 < again.prompt_tokens_details.cached_tokens < again.prompt_tokens
    other = ask(prompt, max_tokens=1, cache_salt="another").usage
    assert other.prompt_tokens_details is None or other.prompt_tokens_details.cached_tokens == 0
    unread = ask(prompt, max_tokens=1, **salt, skip_reading_prefix_cache=True).usage
    assert unread.prompt_tokens_details is None or unread.prompt_tokens_details.cached_tokens == 0
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(ask(stream=True, stream_options=options))
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 12
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts) and counts[0] >= 1
    assert all(chunk.usage is None for chunk in ask(stream=True))


def test_the_cache_is_counted_in_every_api(served: Server) -> None:
    long = " ".join([LONG] * 4)
    body = {"model": MODEL, "max_tokens": 1, "messages": [{"role": "user", "content": long}]}
    salted = {**body, "cache_salt": "every"}
    assert served.post("/v1/messages", salted).json()["usage"]["cache_read_input_tokens"] == 0
    usage = served.post("/v1/messages", salted).json()["usage"]
    cached = usage["cache_read_input_tokens"]
    assert cached > 0
    chat = served.post("/v1/chat/completions", salted).json()["usage"]
    assert chat["prompt_tokens_details"]["cached_tokens"] == cached
    assert chat["prompt_tokens"] == usage["input_tokens"] + cached
    asked = {"model": MODEL, "input": long, "max_output_tokens": 1, "cache_salt": "every"}
    response = served.post("/v1/responses", asked).json()["usage"]
    assert response["input_tokens_details"]["cached_tokens"] == cached
    assert response["input_tokens"] == chat["prompt_tokens"]


def test_requests_are_named_as_they_ask(ask: Any, served: Server) -> None:
    assert ask(request_id="mine").id == "cmpl-mine"
    body = {"model": MODEL, "messages": CHAT.chat, "max_tokens": 1}
    create: Any = served.openai().chat.completions.create
    answer = create(**body, extra_headers={"X-Request-Id": "theirs"})
    assert answer.id == answer._request_id == "chatcmpl-theirs"


def test_the_prompt_is_cut_and_begun_as_asked(ask: Any) -> None:
    cut = ask(LONG, truncate_prompt_tokens=4, return_token_ids=True, max_tokens=1)
    whole = ask(LONG, return_token_ids=True, max_tokens=1)
    assert cut.choices[0].prompt_token_ids == whole.choices[0].prompt_token_ids[-4:]
    assert ask(add_special_tokens=False, max_tokens=1).usage.prompt_tokens == 5


def test_fields_without_a_visible_effect_are_taken(ask: Any) -> None:
    plain = text_of(ask())
    for field in (
        {"priority": -3},
        {"user": "me"},
        {"stream_interval": 4},
        {"spaces_between_special_tokens": False},
        {"timeout": 60.0},
    ):
        assert text_of(ask(**field)) == plain, field


@pytest.mark.parametrize(
    "field",
    [
        {"temperature": -1},
        {"top_p": 0},
        {"top_k": -2},
        {"min_p": 2},
        {"presence_penalty": 3},
        {"repetition_penalty": 0},
        {"n": 0},
        {"max_tokens": -5},
        {"min_tokens": 99},
        {"logprobs": 10_000},
        {"stop": list("abcde")},
        {"logit_bias": {"a": 1}},
        {"allowed_token_ids": []},
        {"truncate_prompt_tokens": 0},
        {"request_id": "with a space"},
    ],
    ids=lambda field: next(iter(field)),
)
def test_a_value_out_of_range_is_named(ask: Any, field: dict[str, Any]) -> None:
    [name] = field
    with pytest.raises(openai.BadRequestError, match=name):
        ask(**field)
