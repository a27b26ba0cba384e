"""Calls that must be made, by SmolLM2 itself: a grammar sees to it."""

import json
from typing import Any

import anthropic

from tests.server.conftest import Server

TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"the {name} of a city",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "maxLength": 20},
                    "unit": {"enum": ["metric", "imperial"]},
                },
                "required": ["city", "unit"],
                "additionalProperties": False,
            },
        },
    }
    for name in ("weather", "population")
]
ASKED: Any = {
    "model": "smollm2-135m",
    "messages": [{"role": "user", "content": "What is the weather in Paris?"}],
    "tools": TOOLS,
    "temperature": 0,
    "max_tokens": 200,
}


def check(name: str, arguments: str) -> None:
    assert name in ("weather", "population")
    value = json.loads(arguments)
    assert set(value) == {"city", "unit"} and value["unit"] in ("metric", "imperial")


def test_a_required_call_is_made_whole_and_streamed(served: Server) -> None:
    client = served.openai()
    asked = ASKED | {"tool_choice": "required", "parallel_tool_calls": False}
    choice = client.chat.completions.create(**asked).choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    [call] = choice.message.tool_calls
    check(call.function.name, call.function.arguments)
    name, arguments = "", ""
    for chunk in client.chat.completions.create(**asked, stream=True):
        for piece in chunk.choices[0].delta.tool_calls or []:
            name += piece.function.name or ""
            arguments += piece.function.arguments or ""
    assert (name, arguments) == (call.function.name, call.function.arguments)


def test_only_an_allowed_tool_is_called(served: Server) -> None:
    population = {"type": "function", "function": {"name": "population"}}
    only: Any = {"mode": "required", "tools": [population]}
    choice = {"type": "allowed_tools", "allowed_tools": only}
    asked = ASKED | {"tool_choice": choice, "parallel_tool_calls": False}
    [call] = served.openai().chat.completions.create(**asked).choices[0].message.tool_calls
    check(call.function.name, call.function.arguments)
    assert call.function.name == "population"


def test_a_named_call_is_made_and_its_arguments_stream(served: Server) -> None:
    client = served.openai()
    asked = ASKED | {"tool_choice": {"type": "function", "function": {"name": "population"}}}
    [call] = client.chat.completions.create(**asked).choices[0].message.tool_calls
    assert call.function.name == "population"
    check(call.function.name, call.function.arguments)
    pieces = [
        piece
        for chunk in client.chat.completions.create(**asked, stream=True)
        for piece in chunk.choices[0].delta.tool_calls or []
    ]
    assert len(pieces) > 4
    assert "".join(piece.function.arguments for piece in pieces) == call.function.arguments


def test_several_choices_each_make_their_call(served: Server) -> None:
    asked = ASKED | {"tool_choice": "required", "parallel_tool_calls": False}
    asked |= {"n": 3, "temperature": 1, "seed": 5}
    answer = served.openai().chat.completions.create(**asked)
    for choice in answer.choices:
        [call] = choice.message.tool_calls
        check(call.function.name, call.function.arguments)


def test_the_other_apis_make_the_same_call(served: Server) -> None:
    function = TOOLS[0]["function"]
    said = ASKED["messages"]
    body: Any = {
        "model": "smollm2-135m",
        "input": "What is the weather in Paris?",
        "tools": [{"type": "function", **function}],
        "tool_choice": "required",
        "temperature": 0,
        "max_output_tokens": 200,
    }
    responses = served.openai().responses.create(**body)
    [item] = [item for item in responses.output if item.type == "function_call"]
    check(item.name, item.arguments)
    client = anthropic.Anthropic(base_url=served.url, api_key="none", max_retries=0)
    tool: Any = {
        "name": "weather",
        "description": function["description"],
        "input_schema": function["parameters"],
    }
    asked: Any = {
        "model": "smollm2-135m",
        "messages": said,
        "tools": [tool],
        "tool_choice": {"type": "any"},
        "max_tokens": 200,
        "extra_body": {"temperature": 0},
    }
    message = client.messages.create(**asked)
    assert message.stop_reason == "tool_use"
    [block] = message.content
    assert block.type == "tool_use"
    check(block.name, json.dumps(block.input))
    with client.messages.stream(**asked) as stream:
        streamed = stream.get_final_message()
    assert [part.model_dump(exclude={"id"}) for part in streamed.content] == [
        block.model_dump(exclude={"id"})
    ]
