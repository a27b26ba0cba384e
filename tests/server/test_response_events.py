"""Thought, text and calls of tools, as OpenAI's client reads them back."""

from typing import Any

import pytest
from openai import OpenAI

from octavo.server.collect import Delta, ToolCall
from octavo.server.conversions.responses import response_of
from octavo.server.protocol.errors import ApiError
from octavo.server.protocol.responses import ResponsesRequest, usage_of
from octavo.server.response_events import Events
from tests.server.replay import replayed

pytestmark = pytest.mark.filterwarnings("error::UserWarning", "error::DeprecationWarning")
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "name": "weather", "parameters": {}, "strict": False}
]
SAID = [
    Delta(0, 0, reasoning="Let me "),
    Delta(0, 0, reasoning="think."),
    Delta(0, 0, text="I shall "),
    Delta(0, 0, text="ask.\n", tool_calls=[ToolCall(0, "call_a", "weather", '{"city": ')]),
    Delta(0, 0, tool_calls=[ToolCall(0, arguments='"Ulm"}'), ToolCall(1, "call_b", "weather", "")]),
    Delta(0, 0, tool_calls=[ToolCall(1, arguments="{}")], finish_reason="tool_calls"),
]


def begun() -> Events:
    body = ResponsesRequest(input="?", tools=TOOLS)
    return Events(response_of(body, "resp_1", 1, "tiny", {}), 0)


def streamed(said: list[Delta]) -> bytes:
    events = begun()
    frames = [events.start()] + [events.add(delta) for delta in said] + [events.end()]
    events.complete(usage_of(7, 3, 12, 4))
    return b"".join([*frames, events.last()])


def read_back(frames: bytes) -> Any:
    with replayed(frames) as url:
        client: Any = OpenAI(base_url=url, api_key="none", max_retries=0)
        with client.responses.stream(model="tiny", input="?", tools=TOOLS) as stream:
            return list(stream)


def test_the_client_puts_thought_text_and_calls_together():
    events = read_back(streamed(SAID))
    response = events[-1].response
    thought, message, first, second = response.output
    assert thought.content[0].text == "Let me think."
    assert response.output_text == message.content[0].text == "I shall ask.\n"
    assert (first.call_id, first.name, first.arguments) == ("call_a", "weather", '{"city": "Ulm"}')
    assert (second.call_id, second.arguments) == ("call_b", "{}")
    assert response.status == "completed"
    assert all(item.status == "completed" for item in response.output)
    assert response.usage.output_tokens_details.reasoning_tokens == 4
    assert response.usage.input_tokens_details.cached_tokens == 3


def test_every_event_has_its_number_and_every_beginning_its_end():
    events = read_back(streamed(SAID))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type.removeprefix("response.") for event in events]
    assert kinds[:2] == ["created", "in_progress"] and kinds[-1] == "completed"
    assert kinds.count("output_item.added") == kinds.count("output_item.done") == 4
    assert kinds.count("content_part.added") == kinds.count("content_part.done") == 2
    assert kinds.count("function_call_arguments.done") == 2
    assert kinds.count("reasoning_text.delta") == 2 and kinds.count("reasoning_text.done") == 1


def test_the_whole_response_is_the_streamed_one():
    response = read_back(streamed(SAID))[-1].response
    events, whole = begun(), Delta(0, 0)
    for delta in SAID:
        whole.extend(delta)
    events.add(whole)
    events.end()
    for made, item in zip(events.response.output, response.output, strict=True):
        shown = item.model_dump(mode="json", warnings=False, exclude_none=True)
        wanted = {k: v for k, v in made.items() if v is not None and k != "id"}
        assert {name: shown[name] for name in wanted} == wanted


def test_a_failure_closes_what_is_open():
    events = begun()
    frames = events.start() + events.add(SAID[2]) + events.fail(ApiError(500, "it broke"))
    last = read_back(frames)[-1]
    assert last.type == "response.failed" and last.response.status == "failed"
    assert (last.response.error.code, last.response.error.message) == ("server_error", "it broke")
    assert last.response.output[0].status == "incomplete"


def test_a_response_that_says_nothing_has_one_empty_message():
    response = read_back(streamed([Delta(0, 0, finish_reason="stop")]))[-1].response
    assert response.output_text == "" and response.output[0].type == "message"
