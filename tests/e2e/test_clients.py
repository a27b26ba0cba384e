"""SmolLM2 served, asked by the real clients: conversations in every API, streamed and not."""

import asyncio
import json
from typing import Any

import anthropic
import openai
import pytest
from openai import AsyncOpenAI

from tests.e2e.golden import CHAT, COMPLETION
from tests.server.conftest import PATIENCE, Server

pytestmark = pytest.mark.filterwarnings("error::UserWarning", "error::DeprecationWarning")
MODEL = "smollm2-135m"
TOKENS = len(CHAT.output_ids)
QUESTION = CHAT.chat[0]["content"]
MORE = "And the capital of Germany?"
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}, "big": {"type": "boolean"}},
    "required": ["city", "big"],
    "additionalProperties": False,
}


@pytest.fixture
def client(served: Server) -> Any:
    """Untyped: fields that its types do not know are sent on purpose."""
    return served.openai()


@pytest.fixture
def claude(served: Server) -> Any:
    return anthropic.Anthropic(base_url=served.url, api_key="none", max_retries=0, timeout=PATIENCE)


# --- the golden text, by every door


def test_chat(client: Any) -> None:
    body = {"model": MODEL, "messages": CHAT.chat, "max_tokens": TOKENS, "temperature": 0}
    answer = client.chat.completions.create(**body)
    assert answer.choices[0].message.content == CHAT.spoken
    assert answer.choices[0].finish_reason == CHAT.finish_reason
    assert answer.usage.prompt_tokens == CHAT.prompt_tokens
    assert answer.usage.completion_tokens == TOKENS
    usage = {"stream_options": {"include_usage": True}}
    chunks = list(client.chat.completions.create(**body, stream=True, **usage))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == CHAT.spoken
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == TOKENS


def test_completions(client: Any) -> None:
    body = {"model": MODEL, "max_tokens": len(COMPLETION.output_ids), "temperature": 0}
    for prompt in (COMPLETION.prompt, COMPLETION.input_ids):
        answer = client.completions.create(**body, prompt=prompt)
        assert answer.choices[0].text == COMPLETION.text
        assert answer.usage.prompt_tokens == COMPLETION.prompt_tokens
        chunks = client.completions.create(**body, prompt=prompt, stream=True)
        assert "".join(chunk.choices[0].text for chunk in chunks) == COMPLETION.text


def test_completions_of_several_prompts_keep_their_order(client: Any) -> None:
    body = {"model": MODEL, "max_tokens": 5, "temperature": 0}
    prompts = ["One, two, three,", COMPLETION.prompt]
    alone = [client.completions.create(**body, prompt=p).choices[0].text for p in prompts]
    for given in (prompts, [client_ids(client, p) for p in prompts]):
        together = client.completions.create(**body, prompt=given)
        assert [choice.text for choice in together.choices] == alone
        assert [choice.index for choice in together.choices] == [0, 1]
        texts = ["", ""]
        for chunk in client.completions.create(**body, prompt=given, stream=True):
            for choice in chunk.choices:
                texts[choice.index] += choice.text
        assert texts == alone


def client_ids(client: Any, text: str) -> list[int]:
    answer = client.post("../tokenize", body={"prompt": text}, cast_to=object)
    return answer["tokens"]


def test_an_echo_comes_before_the_text_and_a_suffix_is_refused(client: Any) -> None:
    body = {"model": MODEL, "prompt": COMPLETION.prompt, "max_tokens": 1, "temperature": 0}
    assert client.completions.create(**body, echo=True).choices[0].text == (
        COMPLETION.prompt + " Paris"
    )
    with pytest.raises(openai.BadRequestError, match="`suffix` is not supported"):
        client.completions.create(**body, suffix="!")


def test_responses(client: Any) -> None:
    body = {"model": MODEL, "input": QUESTION, "max_output_tokens": TOKENS, "temperature": 0}
    response = client.responses.create(**body)
    assert (response.output_text, response.status) == (CHAT.spoken, "completed")
    assert response.usage.input_tokens == CHAT.prompt_tokens
    assert response.usage.output_tokens == TOKENS
    with client.responses.stream(**body) as stream:
        deltas = [e.delta for e in stream if e.type == "response.output_text.delta"]
        assert "".join(deltas) == stream.get_final_response().output_text == CHAT.spoken
        assert len(deltas) > 1


def test_a_chain_of_responses_is_the_conversation_sent_whole(client: Any) -> None:
    body = {"model": MODEL, "max_output_tokens": 16, "temperature": 0}
    first = client.responses.create(**body, input=QUESTION)
    chained = client.responses.create(**body, input=MORE, previous_response_id=first.id)
    said = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": MORE},
    ]
    whole = client.responses.create(**body, input=said)
    chat = client.chat.completions.create(model=MODEL, messages=said, max_tokens=16, temperature=0)
    assert chained.output_text == whole.output_text == chat.choices[0].message.content
    assert chained.usage.input_tokens == whole.usage.input_tokens == chat.usage.prompt_tokens
    assert chained.usage.input_tokens_details.cached_tokens > 0
    items = client.responses.input_items.list(chained.id, order="asc").data
    assert [item.role for item in items] == ["user", "assistant", "user"]


def test_a_response_in_the_background_is_polled_and_cancelled(client: Any, served: Server) -> None:
    body = {"model": MODEL, "input": QUESTION, "temperature": 0, "background": True}
    response = client.responses.create(**body, max_output_tokens=TOKENS)
    served.until(
        lambda: client.responses.retrieve(response.id).status == "completed", "it never ended"
    )
    assert client.responses.retrieve(response.id).output_text == CHAT.spoken
    endless = {"ignore_eos": True}
    response = client.responses.create(**body, max_output_tokens=1500, extra_body=endless)
    assert client.responses.cancel(response.id).status == "cancelled"
    served.until(lambda: served.metric("vllm:num_requests_running") == 0, "the work goes on")
    client.responses.delete(response.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(response.id)


def test_messages(claude: Any) -> None:
    body = {"model": MODEL, "messages": CHAT.chat, "max_tokens": TOKENS}
    greedy = {"temperature": 0}
    message = claude.messages.create(**body, extra_body=greedy)
    assert (message.content[0].text, message.stop_reason) == (CHAT.spoken, "end_turn")
    usage = message.usage
    assert usage.input_tokens + usage.cache_read_input_tokens == CHAT.prompt_tokens
    assert usage.output_tokens == TOKENS
    counted = claude.messages.count_tokens(model=MODEL, messages=CHAT.chat)
    assert counted.input_tokens == CHAT.prompt_tokens
    with claude.messages.stream(**body, extra_body=greedy) as stream:
        text = "".join(stream.text_stream)
        assert text == stream.get_final_message().content[0].text == CHAT.spoken


def test_messages_stop_where_they_are_told(claude: Any) -> None:
    body = {"model": MODEL, "messages": CHAT.chat, "extra_body": {"temperature": 0}}
    message = claude.messages.create(**body, max_tokens=20, stop_sequences=["France is"])
    assert message.content[0].text == "The capital of "
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "France is")
    message = claude.messages.create(**body, max_tokens=3)
    assert (message.content[0].text, message.stop_reason) == ("The capital of", "max_tokens")
    begun = [*CHAT.chat, {"role": "assistant", "content": "The capital of France is"}]
    body["messages"] = begun
    assert claude.messages.create(**body, max_tokens=20).content[0].text == " Paris."


# --- forms of the text


def is_city(text: str) -> bool:
    value = json.loads(text)
    return set(value) == {"city", "big"} and isinstance(value["big"], bool)


def test_a_schema_is_kept_in_every_api(client: Any, claude: Any) -> None:
    named = {"name": "city", "schema": CITY, "strict": True}
    form = {"type": "json_schema", "json_schema": named}
    body = {"model": MODEL, "messages": CHAT.chat, "max_tokens": 60, "temperature": 0}
    answer = client.chat.completions.create(**body, response_format=form)
    assert is_city(answer.choices[0].message.content)
    text = {"format": {"type": "json_schema", **named}}
    asked = {"model": MODEL, "input": QUESTION, "max_output_tokens": 60, "temperature": 0}
    assert is_city(client.responses.create(**asked, text=text).output_text)
    with client.responses.stream(**asked, text=text) as stream:
        assert is_city(stream.get_final_response().output_text)
    output = {"format": {"type": "json_schema", "schema": CITY}}
    said = {"model": MODEL, "max_tokens": 60, "messages": CHAT.chat}
    extra = {"temperature": 0, "output_config": output}
    assert is_city(claude.messages.create(**said, extra_body=extra).content[0].text)


def test_the_other_forms_are_kept(client: Any) -> None:
    body = {"model": MODEL, "prompt": "It is", "max_tokens": 40, "temperature": 0}
    for form, holds in (
        ({"regex": "[0-9]{3}-[a-z]{2}"}, lambda text: len(text) == 6 and text[3] == "-"),
        ({"choice": ["yes", "no"]}, lambda text: text in ("yes", "no")),
        ({"grammar": 'root ::= "a" "b"+ "c"'}, lambda text: text.strip("abc") == ""),
        ({"json": CITY}, is_city),
    ):
        for stream in (False, True):
            extra = {"structured_outputs": form}
            answer = client.completions.create(**body, stream=stream, extra_body=extra)
            texts = [chunk.choices[0].text for chunk in (answer if stream else [answer])]
            assert holds("".join(texts)), (form, texts)


def test_a_schema_that_is_wrong_is_named_by_the_field_that_was_sent(
    client: Any, claude: Any
) -> None:
    wrong = {"type": "json_schema", "name": "a", "schema": {"type": "nothing"}}
    with pytest.raises(openai.BadRequestError, match="`text.format"):
        client.responses.create(model=MODEL, input="a", text={"format": wrong})
    with pytest.raises(anthropic.BadRequestError, match="`output_config.format"):
        extra = {"output_config": {"format": wrong}}
        body = {"model": MODEL, "max_tokens": 9, "messages": CHAT.chat}
        claude.messages.create(**body, extra_body=extra)


# --- models, tokens, many at once


def test_models_are_listed_and_found(client: Any) -> None:
    [card] = client.models.list().data
    assert (card.id, client.models.retrieve(MODEL).id) == (MODEL, MODEL)
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.models.retrieve("other")


def test_an_unknown_model_is_not_found_in_any_api(client: Any, claude: Any) -> None:
    said = CHAT.chat
    for ask in (
        lambda: client.chat.completions.create(model="other", messages=said),
        lambda: client.completions.create(model="other", prompt="a"),
        lambda: client.responses.create(model="other", input="a"),
    ):
        with pytest.raises(openai.NotFoundError, match="does not exist"):
            ask()
    with pytest.raises(anthropic.NotFoundError, match="does not exist"):
        claude.messages.create(model="other", max_tokens=1, messages=said)


def test_probes_and_descriptions_answer(served: Server) -> None:
    for path in ("/health", "/ready", "/version", "/metrics", "/openapi.json", "/docs", "/"):
        assert served.get(path).status_code == 200, path


def test_tokens_of_a_prompt_and_back(served: Server) -> None:
    tokens = served.post("/tokenize", {"prompt": COMPLETION.prompt}).json()
    assert tokens["tokens"] == COMPLETION.input_ids and tokens["count"] == 5
    text = served.post("/detokenize", {"tokens": tokens["tokens"]}).json()
    assert text == {"prompt": COMPLETION.prompt}
    chat = served.post("/tokenize", {"messages": CHAT.chat}).json()
    assert chat["count"] == CHAT.prompt_tokens


@pytest.mark.parametrize("api", ["chat", "responses"])
async def test_many_at_once_do_not_disturb_each_other(served: Server, api: str) -> None:
    client: Any = AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)

    async def one(i: int) -> str:
        if i % 2:  # noise between the others
            noise = {"messages": [{"role": "user", "content": str(i)}], "seed": i}
            await client.chat.completions.create(model=MODEL, max_tokens=TOKENS, **noise)
            return CHAT.spoken
        if api == "chat":
            body = {"messages": CHAT.chat, "max_tokens": TOKENS, "temperature": 0}
            answer = await client.chat.completions.create(model=MODEL, **body)
            return answer.choices[0].message.content
        body = {"input": QUESTION, "max_output_tokens": TOKENS, "temperature": 0}
        return (await client.responses.create(model=MODEL, **body)).output_text

    assert await asyncio.gather(*(one(i) for i in range(12))) == [CHAT.spoken] * 12
    await client.close()
