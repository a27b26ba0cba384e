"""/v1/messages and /v1/messages/count_tokens against an engine that repeats the prompt."""

from typing import Any

import anthropic
import pytest
from anthropic import Anthropic

from tests.server.conftest import PATIENCE, Server

pytestmark = pytest.mark.filterwarnings("error::UserWarning", "error::DeprecationWarning")
HELLO = [{"role": "user", "content": "hello"}]
ABORTED = 'vllm:request_success_total{engine="0",finished_reason="abort"'
TOOL = {"name": "weather", "input_schema": {"type": "object", "properties": {}}}


def client_of(server: Server) -> Any:
    """Untyped: what its types refuse is sent on purpose."""
    return Anthropic(base_url=server.url, api_key="none", max_retries=0, timeout=PATIENCE)


def body_of(caught: Any) -> Any:
    return caught.value.body


def ask(server: Server, **fields: Any) -> Any:
    """Its client refuses some fields itself; these go as they are."""
    body = {"model": "tiny", "max_tokens": 13, "messages": HELLO}
    return client_of(server).messages.create(**body, extra_body=fields)


def test_a_message_has_content_usage_and_a_stop_reason(server):
    message = ask(server)
    assert [block.text for block in message.content] == ["<user>hello<a"]
    assert (message.role, message.stop_reason) == ("assistant", "max_tokens")
    assert message.id.startswith("msg_") and message._request_id == message.id
    assert (message.usage.input_tokens, message.usage.output_tokens) == (22, 13)


def test_a_stream_is_the_same_message(server):
    body = {"model": "tiny", "max_tokens": 13, "messages": HELLO}
    with client_of(server).messages.stream(**body) as stream:
        kinds = [event.type for event in stream]
        streamed = stream.get_final_message()
    whole = ask(server)
    assert streamed.content[0].text == whole.content[0].text
    assert streamed.usage.output_tokens == whole.usage.output_tokens
    assert streamed.stop_reason == whole.stop_reason
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-1] == "message_stop" and kinds.count("text") > 1


def test_the_events_have_names_and_none_is_done(server):
    body = {"model": "tiny", "max_tokens": 3, "messages": HELLO, "stream": True}
    text = server.post("/v1/messages", body).text
    names = [line[7:] for line in text.splitlines() if line.startswith("event: ")]
    assert names[:3] == ["message_start", "ping", "content_block_start"]
    assert names[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert "[DONE]" not in text


def test_system_and_blocks_become_the_prompt(server):
    blocks = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    said = [{"role": "user", "content": blocks}, {"role": "user", "content": "three"}]
    message = ask(server, system=[{"type": "text", "text": "be brief"}], messages=said)
    whole = "<system>be brief<user>one\ntwo\nthree<assistant>"
    again = ask(server, system="be brief", messages=said, max_tokens=len(whole))
    assert again.content[0].text == whole
    assert again.content[0].text.startswith(message.content[0].text)


def test_results_and_thoughts_of_earlier_turns_are_taken(server):
    said = [
        *HELLO,
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": "x"},
                {"type": "text", "text": "wait"},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t", "content": [
                    {"type": "text", "text": "sunny"}]},
                {"type": "text", "text": "so?"},
            ],
        },
    ]  # fmt: skip
    text = ask(server, messages=said, max_tokens=90).content[0].text
    result = "<user><tool_response>\nsunny\n</tool_response>"  # this template knows no tools
    assert text.startswith(f"<user>hello<assistant>wait{result}<user>so?<assistant>")


def test_a_last_message_of_the_assistant_is_gone_on_with(server):
    said = [*HELLO, {"role": "assistant", "content": "I think"}]
    counted = client_of(server).messages.count_tokens(model="tiny", messages=said)
    assert counted.input_tokens == len("<user>hello<assistant>I think")


def test_a_stop_sequence_is_named(server):
    message = ask(server, stop_sequences=["never", "hel"], max_tokens=40)
    assert message.content[0].text == "<user>"
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "hel")


def test_count_tokens_counts_the_prompt_that_would_be_read(server):
    fields = {"system": "be brief", "messages": HELLO}
    counted = client_of(server).messages.count_tokens(model="tiny", **fields)
    assert counted.input_tokens == ask(server, **fields).usage.input_tokens


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 7}]}, "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
            "messages[0].content[0].type",
        ),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"stop_sequences": list("abcde")}, "stop_sequences"),
        ({"temperature": -1}, "temperature"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"name": "weather"}]}, "tools[0].input_schema"),
        ({"tools": [TOOL], "tool_choice": {"type": "some"}}, "tool_choice.type"),
        ({"thinking": {"type": "enabled", "budget_tokens": 99}}, "thinking.budget_tokens"),
        ({"output_config": {"format": {"type": "xml"}}}, "output_config.format.type"),
        ({"container": "c"}, "container"),
    ],
)
def test_what_cannot_be_served_is_named_in_anthropics_shape(server, fields, named):
    with pytest.raises(anthropic.BadRequestError) as caught:
        ask(server, **fields)
    body = body_of(caught)
    assert body["type"] == "error" and body["error"]["type"] == "invalid_request_error"
    assert f"`{named}`" in body["error"]["message"]
    assert body["request_id"] == caught.value.request_id


def test_other_errors_have_their_own_types(server):
    with pytest.raises(anthropic.NotFoundError) as caught:
        ask(server, model="other")
    assert body_of(caught)["error"]["type"] == "not_found_error"
    answer = server.post("/v1/messages", {"model": "tiny", "messages": HELLO}).json()
    missing = {"type": "invalid_request_error", "message": "`max_tokens` is required"}
    assert answer["error"] == missing


def test_an_engine_error_after_the_first_token_is_an_error_event(server):
    body = {"model": "tiny", "max_tokens": 9, "messages": HELLO, "stream": True}
    seen = []
    with pytest.raises(anthropic.APIStatusError) as caught:
        for event in client_of(server).messages.create(**body, extra_body={"cache_salt": "fail"}):
            seen.append(event.type)
    assert "content_block_delta" in seen
    assert body_of(caught)["error"] == {"type": "api_error", "message": "it was told to"}


def test_a_key_is_asked_for_in_anthropics_shape(launch):
    keyed = launch("--api-key", "secret")
    body: Any = {"model": "tiny", "max_tokens": 1, "messages": HELLO}
    with pytest.raises(anthropic.AuthenticationError) as caught:
        client_of(keyed).messages.create(**body)
    assert body_of(caught)["error"]["type"] == "authentication_error"
    client = Anthropic(base_url=keyed.url, api_key="secret", max_retries=0)
    assert client.messages.create(**body).stop_reason == "max_tokens"


def test_a_wrong_method_is_told_in_anthropics_shape(server):
    answer = server.get("/v1/messages")
    assert answer.status_code == 405
    assert answer.json()["type"] == "error" and answer.headers["request-id"]


def test_a_full_queue_is_overloaded(launch):
    full = launch("--max-num-queued-reqs", "1", step=0.2)
    client = client_of(full)
    body = {"model": "tiny", "max_tokens": 200, "messages": HELLO, "stream": True}
    with pytest.raises(anthropic.APIStatusError) as caught:
        streams = [client.messages.create(**body) for _ in range(8)]
        del streams
    assert caught.value.status_code == 529
    assert body_of(caught)["error"]["type"] == "overloaded_error"
    assert caught.value.response.headers["retry-after"] == "1"


def test_a_client_that_leaves_takes_its_work_along(server):
    before = server.metric(ABORTED)
    body = {"model": "tiny", "max_tokens": 480, "messages": HELLO, "stream": True}
    stream = client_of(server).messages.create(**body)
    next(iter(stream))
    stream.close()
    server.until(lambda: server.metric(ABORTED) == before + 1, "nobody aborted")
