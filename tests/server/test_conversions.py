"""Bodies of other APIs as chat bodies: tools, thought, and what stands together."""

from typing import Any

import msgspec
import pytest

from octavo.server.conversions import messages, responses
from octavo.server.conversions.common import own_names
from octavo.server.protocol.errors import ApiError, bad_request
from octavo.server.protocol.messages import MessagesRequest
from octavo.server.protocol.responses import ResponsesRequest
from octavo.server.protocol.tools import Tool

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "Now", "parameters": SCHEMA},
}
CALL = {
    "id": "c1",
    "type": "function",
    "function": {"name": "weather", "arguments": '{"city":"Ulm"}'},
}


def from_messages(**fields: Any) -> Any:
    body = {"max_tokens": 99, "messages": [{"role": "user", "content": "a"}], **fields}
    return messages.to_chat(msgspec.convert(body, MessagesRequest))


def from_responses(**fields: Any) -> Any:
    body = msgspec.convert({"input": "a", **fields}, ResponsesRequest)
    return responses.to_chat(body, responses.items_of(body))


def test_a_conversation_with_tools_is_the_same_from_both() -> None:
    claude = from_messages(
        system="s",
        tools=[{"name": "weather", "description": "Now", "input_schema": SCHEMA}],
        messages=[
            {"role": "user", "content": "a"},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "hm", "signature": ""},
                    {"type": "text", "text": "b"},
                    {"type": "tool_use", "id": "c1", "name": "weather", "input": {"city": "Ulm"}},
                ],
            },
            {
                "role": "user",
                "content": [{"type": "tool_result", "tool_use_id": "c1", "content": "sunny"}],
            },
        ],
    )
    openai = from_responses(
        instructions="s",
        tools=[{"type": "function", "name": "weather", "description": "Now", "parameters": SCHEMA}],
        input=[
            {"role": "user", "content": "a"},
            {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "hm"}]},
            {"role": "assistant", "content": [{"type": "output_text", "text": "b"}]},
            {
                "type": "function_call",
                "call_id": "c1",
                "name": "weather",
                "arguments": '{"city":"Ulm"}',
            },
            {"type": "function_call_output", "call_id": "c1", "output": "sunny"},
        ],
    )
    assert claude.messages == openai.messages
    assert claude.messages == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "reasoning_content": "hm", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
    ]
    assert claude.tools == openai.tools == [msgspec.convert(TOOL, Tool)]


NAMED = {"type": "function", "function": {"name": "weather"}}


@pytest.mark.parametrize(
    ("claude", "openai", "chat"),
    [
        ({"type": "auto"}, "auto", "auto"),
        ({"type": "any"}, "required", "required"),
        ({"type": "none"}, "none", "none"),
        (
            {"type": "tool", "name": "weather"},
            {"type": "function", "name": "weather"},
            NAMED,
        ),
    ],
)
def test_a_choice_of_tools_is_the_same_from_both(claude: Any, openai: Any, chat: Any) -> None:
    tools = [{"name": "weather", "input_schema": SCHEMA}]
    assert from_messages(tools=tools, tool_choice=claude).tool_choice == chat
    tools = [{"type": "function", "name": "weather", "parameters": SCHEMA}]
    assert from_responses(tools=tools, tool_choice=openai).tool_choice == chat


def test_only_the_allowed_tools_remain() -> None:
    tools: list = [{"type": "function", "name": name, "parameters": {}} for name in ("a", "b")]
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [{"name": "b"}]}
    chat = from_responses(tools=tools, tool_choice=allowed)
    chat.check()
    assert [tool.function.name for tool in chat.tools] == ["b"]
    assert chat.tool_choice == "required"


@pytest.mark.parametrize(
    ("thinking", "enabled"),
    [
        (None, False),
        ({"type": "disabled"}, False),
        ({"type": "adaptive"}, True),
        ({"type": "enabled", "budget_tokens": 50}, True),
    ],
)
def test_thinking_is_off_unless_asked_for(thinking: Any, enabled: bool) -> None:
    chat = from_messages(thinking=thinking)
    assert chat.chat_template_kwargs == {"enable_thinking": enabled}


def test_effort_and_form_are_chats() -> None:
    chat = from_responses(
        reasoning={"effort": "low"},
        text={"format": {"type": "json_schema", "name": "n", "schema": SCHEMA}},
    )
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}
    assert (chat.reasoning_effort, chat.response_format) == ("low", form)
    assert from_responses(reasoning={"effort": "none"}).chat_template_kwargs == {
        "enable_thinking": False
    }
    chat = from_messages(
        output_config={"effort": "low", "format": {"type": "json_schema", "schema": SCHEMA}}
    )
    assert chat.reasoning_effort == "low"
    assert chat.response_format["json_schema"]["schema"] == SCHEMA


def test_fields_of_sampling_are_handed_on() -> None:
    extras = {"top_k": 3, "priority": 2, "cache_salt": "s", "seed": 4, "min_p": 0.5}
    for chat in (from_messages(**extras), from_responses(**extras)):
        assert {name: getattr(chat, name) for name in extras} == extras
    assert from_messages(stop_sequences=["x"]).stop == ["x"]
    assert from_messages().max_tokens == 99
    assert from_responses(max_output_tokens=7).max_completion_tokens == 7


def test_errors_name_the_fields_that_were_sent() -> None:
    with pytest.raises(ApiError) as caught, own_names(responses.NAMES):
        raise bad_request("`response_format.json_schema.schema` is wrong", "response_format")
    assert caught.value.message == "`text.format.schema` is wrong"
    assert caught.value.param == "text.format"
