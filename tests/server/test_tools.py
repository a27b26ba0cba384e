"""Tools and thoughts through the real server; the fake engine says what the conversation says."""

import json
from typing import Any

import pytest

from octavo.engine.sampling_params import SamplingParams, StructuredOutputsParams
from octavo.server.calls import forced_form
from octavo.server.protocol.tools import Function, Tool
from octavo.server.speech import Speech
from tests.server.conftest import Server

WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}
CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Paris"}}</tool_call>'
REPEAT = "{% for m in messages %}{{ m.content }}{% endfor %}"  # so that the fake engine says it
TOOLED = "{% if tools %}{% endif %}" + REPEAT


DEEP: dict = {"type": "object"}
for _ in range(300):
    DEEP = {"type": "object", "properties": {"a": DEEP}}


def forced(parameters: dict) -> dict:
    function = {"name": "f", "parameters": parameters}
    return {"tools": [{"type": "function", "function": function}], "tool_choice": "required"}


@pytest.fixture
def talker(launch, tmp_path):
    """A server whose model says the last message, and knows tools."""

    def start(template: str = TOOLED, *flags: str) -> Server:
        file = tmp_path / "template.jinja"
        file.write_text(template)
        return launch("--chat-template", str(file), *flags)

    return start


def say(text: str) -> list:
    return [{"role": "user", "content": text}]


def test_a_call_is_found_whole_and_streamed(talker):
    client = talker().openai()
    text = f"I ask. {CALL}"
    asked = {"model": "tiny", "messages": say(text), "tools": [WEATHER], "max_tokens": len(text)}
    choice = client.chat.completions.create(**asked).choices[0]
    assert choice.finish_reason == "length", "the fake engine ends nothing by itself"
    assert choice.message.content == "I ask."
    [call] = choice.message.tool_calls
    assert (call.type, call.function.name) == ("function", "weather")
    assert json.loads(call.function.arguments) == {"city": "Paris"}
    pieces = [
        chunk.choices[0].delta for chunk in client.chat.completions.create(**asked, stream=True)
    ]
    calls = [call for piece in pieces for call in piece.tool_calls or []]
    assert [call.function.name for call in calls] == ["weather", None]
    assert calls[0].id and calls[0].type == "function" and calls[0].function.arguments == ""
    assert json.loads(calls[1].function.arguments) == {"city": "Paris"}
    assert "".join(piece.content or "" for piece in pieces) == "I ask."


def test_an_answer_that_ends_with_a_call_says_so(talker):
    text = CALL + "!"
    asked = {"messages": say(text), "tools": [WEATHER], "max_tokens": 400, "stop": "!"}
    answer = talker().post("/v1/chat/completions", asked).json()["choices"][0]
    assert answer["finish_reason"] == "tool_calls"
    assert answer["message"]["content"] is None


def test_a_broken_call_is_text(talker):
    text = "<tool_call>weather in Paris</tool_call>"
    asked = {"messages": say(text), "tools": [WEATHER], "max_tokens": len(text)}
    message = talker().post("/v1/chat/completions", asked).json()["choices"][0]["message"]
    assert message == {"role": "assistant", "content": text, "refusal": None}


def test_without_tools_the_marks_are_text(talker):
    server = talker()
    asked = {"messages": say(CALL), "max_tokens": len(CALL)}
    for more in ({}, {"tools": [WEATHER], "tool_choice": "none"}):
        message = server.post("/v1/chat/completions", asked | more).json()["choices"][0]["message"]
        assert message["content"] == CALL


def test_only_the_first_call_counts_where_one_is_asked_for(talker):
    text = CALL + CALL
    asked = {"messages": say(text), "tools": [WEATHER], "max_tokens": len(text)}
    server = talker()
    several = server.post("/v1/chat/completions", asked).json()["choices"][0]["message"]
    assert len(several["tool_calls"]) == 2
    one = {"parallel_tool_calls": False}
    single = server.post("/v1/chat/completions", asked | one).json()["choices"][0]["message"]
    assert len(single["tool_calls"]) == 1


def test_a_template_that_knows_no_tools_is_told_of_them(talker):
    server = talker("{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}")
    told = {"messages": say("hi"), "tools": [WEATHER], "max_tokens": 300}
    text = server.post("/v1/chat/completions", told).json()["choices"][0]["message"]["content"]
    assert text.startswith("[system]You may call functions.")
    assert '<tools>\n{"type": "function"' in text


def test_earlier_calls_reach_the_template(talker):
    template = (
        "{% if tools %}{% endif %}{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or"
        " [] %}({{ c.function.arguments.city }}){% endfor %}{% endfor %}"
    )
    function = {"name": "weather", "arguments": '{"city": "Rome"}'}
    call = {"id": "1", "type": "function", "function": function}
    messages = [
        {"role": "user", "content": "where?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "sunny"},
    ]
    asked = {"messages": messages, "tools": [WEATHER], "max_tokens": 17}
    answer = talker(template).post("/v1/chat/completions", asked).json()
    assert answer["choices"][0]["message"]["content"] == "where?(Rome)sunny"


def test_thoughts_leave_the_answer_and_are_counted(talker):
    server = talker(REPEAT + "{# </think> #}")
    text = "<think>I wonder.</think>Hello"
    asked = {"messages": say(text), "max_tokens": len(text)}
    answer = server.post("/v1/chat/completions", asked).json()
    message = answer["choices"][0]["message"]
    assert (message["reasoning"], message["content"]) == ("I wonder.", "Hello")
    counted = answer["usage"]["completion_tokens_details"]["reasoning_tokens"]
    assert 8 < counted < len(text)
    quiet = server.post("/v1/chat/completions", asked | {"include_reasoning": False}).json()
    assert quiet["choices"][0]["message"] == {
        "role": "assistant",
        "content": "Hello",
        "refusal": None,
    }


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"tool_choice": "required"}, "needs `tools`"),
        ({"tools": [WEATHER], "tool_choice": "maybe"}, "must be none, auto, required"),
        (
            {"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "f"}}},
            "names `f`, which is not in `tools`",
        ),
        (
            {"tools": [WEATHER], "tool_choice": {"type": "allowed_tools", "mode": "auto"}},
            "needs a `mode`, auto or required, and `tools`",
        ),
        (
            {
                "tools": [WEATHER],
                "tool_choice": {
                    "type": "allowed_tools",
                    "allowed_tools": {"mode": "auto", "tools": [{"function": {"name": "f"}}]},
                },
            },
            "names `f`, which is not in `tools`",
        ),
        ({"tools": [WEATHER, WEATHER]}, "names the function weather twice"),
        ({"tools": [{"type": "web_search", "function": {"name": "x"}}]}, "must be function"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "letters, digits"),
        (
            {
                "tools": [WEATHER],
                "tool_choice": "required",
                "guided_regex": "a",
            },
            "excludes a `tool_choice`",
        ),
        ({"functions": [{"name": "f"}]}, "use `tools`"),
        (forced({"$defs": [1]}), "`tools[0].function.parameters.$defs` must be an object"),
        (forced({"properties": "x"}), "`tools[0].function.parameters.properties` must be"),
        (forced(DEEP), "may nest at most 64 levels deep"),
    ],
)
def test_what_cannot_be_asked_is_a_400(server, body, message):
    answer = server.post("/v1/chat/completions", {"messages": say("x"), **body})
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]


def test_a_call_that_is_held_back_does_not_end_the_stream_of_messages(talker):
    text = CALL
    asked = {"model": "tiny", "messages": say(text), "max_tokens": len(text), "stream": True}
    asked["tools"] = [{"name": "weather", "input_schema": WEATHER["function"]["parameters"]}]
    events = talker().post("/v1/messages", asked).text
    assert '"partial_json":"{\\"city\\": \\"Paris\\"}"' in events
    assert events.rstrip().endswith('data: {"type":"message_stop"}')


def test_each_choice_has_its_own_calls_in_the_clients_own_helper(talker):
    text = f"<think>Hm.</think>{CALL}!"
    client = talker(TOOLED + "{# </think> #}").openai()
    asked = {"model": "tiny", "messages": say(text), "tools": [WEATHER], "stop": "!"}
    with client.chat.completions.stream(**asked, n=2, temperature=1) as stream:
        completion = stream.get_final_completion()
    assert len(completion.choices) == 2
    for choice in completion.choices:
        assert choice.finish_reason == "tool_calls"
        assert choice.message.reasoning == "Hm."
        [call] = choice.message.tool_calls
        assert call.function.name == "weather"
        assert json.loads(call.function.arguments) == {"city": "Paris"}
    ids = [choice.message.tool_calls[0].id for choice in completion.choices]
    assert len(set(ids)) == 2


def test_calls_of_mistral_have_the_names_that_its_template_takes(talker):
    text = '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Rome"}}]'
    asked = {"messages": say(text), "tools": [WEATHER], "max_tokens": len(text)}
    server = talker(TOOLED, "--tool-call-parser", "mistral")
    message = server.post("/v1/chat/completions", asked).json()["choices"][0]["message"]
    [call] = message["tool_calls"]
    assert len(call["id"]) == 9 and call["id"].isalnum()


def test_a_property_may_have_the_name_of_a_word_of_json_schema():
    parameters = {
        "type": "object",
        "properties": {"definitions": {"$ref": "#/$defs/text"}, "$ref": {"type": "string"}},
        "required": ["definitions"],
        "$defs": {"text": {"type": "string"}},
    }
    tool = Tool(function=Function(name="f", parameters=parameters))
    schema: Any = forced_form([tool], "", several=True).json
    moved = schema["items"]["anyOf"][0]["properties"]["parameters"]
    assert moved["properties"]["definitions"] == {"$ref": "#/$defs/tool0_text"}
    assert moved["properties"]["$ref"] == {"type": "string"}
    assert schema["$defs"] == {"tool0_text": {"type": "string"}}


def test_a_grammar_waits_for_thoughts_only_where_the_model_surely_thinks():
    ruled = SamplingParams(structured_outputs=StructuredOutputsParams(json_object=True))
    instruct = "{{ m.content.split('</think>') }}"  # cuts earlier thoughts out, and has none itself
    hybrid = instruct + "{% if enable_thinking %}"
    assert Speech("auto", "auto", instruct).mask_after(ruled, "<assistant>") == ""
    assert Speech("auto", "auto", instruct).mask_after(ruled, "<assistant><think>\n") == "</think>"
    assert Speech("auto", "auto", hybrid).mask_after(ruled, "<assistant>") == "</think>"
    assert Speech("auto", "qwen3", instruct).mask_after(ruled, "<assistant>") == "</think>"
    assert Speech("auto", "auto", hybrid).mask_after(ruled, "<think>\n\n</think>\n\n") == ""
