"""Parsers: what they find, that cuts change nothing, and that no text is lost."""

import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo.server.collect import Delta
from octavo.server.parsers.bare import llama3_json, mistral, pythonic
from octavo.server.parsers.choice import Choice
from octavo.server.parsers.events import CallBegins, CallGoesOn, Text, Thought
from octavo.server.parsers.forced import Named, Required
from octavo.server.parsers.harmony import Harmony
from octavo.server.parsers.reasoning import Thinking
from octavo.server.parsers.strip import Strip
from octavo.server.parsers.tagged import Tagged, read_json_calls, xml_reader
from octavo.server.parsers.values import typed

SCHEMAS = {"f": {"properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}}
PARSERS: dict[str, Any] = {
    "hermes": lambda: Tagged(read_json_calls),
    "xml": lambda: Tagged(xml_reader(SCHEMAS)),
    "llama3_json": llama3_json,
    "mistral": mistral,
    "pythonic": pythonic,
    "harmony": Harmony,
    "named": lambda: Named("f"),
    "required": Required,
    "thinking": lambda: Thinking(inside=False),
    "thinking inside": lambda: Thinking(inside=True),
}
ARGUMENTS = {"city": 'Paris </tool_call> "x" é', "days": 3}
CALL = json.dumps({"name": "f", "arguments": ARGUMENTS}, ensure_ascii=False)
XML = (
    "<tool_call>\n<function=f>\n<parameter=city>\nParis\n</parameter>\n"
    "<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>"
)
HARMONY = (
    "<|channel|>analysis<|message|>Let me see.<|end|><|start|>assistant<|channel|>commentary "
    'to=functions.f <|constrain|>json<|message|>{"city": "Paris"}<|call|>'
)
# Each is a text that some model writes, whole, broken or mixed with text.
TEXTS = [
    f"<tool_call>\n{CALL}\n</tool_call>",
    f"Sure. <tool_call>{CALL}</tool_call>\n<tool_call>{CALL}</tool_call> done",
    f"<tool_call>{CALL}",
    "<tool_call>not json</tool_call> and <tool_ca",
    XML,
    f"text {XML} more {XML}",
    "<tool_call><function=f></tool_call>",
    CALL,
    f"{CALL}; {CALL}",
    '<|python_tag|>{"name": "f", "parameters": {}}',
    '{"no": "call"}',
    '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}]',
    'ok [TOOL_CALLS]f{"a": 1}[TOOL_CALLS]g[ARGS]{"b": [2]}',
    "[TOOL_CALLS] oops",
    "[f(city='Paris', days=3), g.h(x=[1, None, true])]",
    "[1, 2, 3]",
    "[f(x)]",
    HARMONY,
    "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Hi!<|return|>",
    "<think>\nI wonder.\n</think>\n\nHello <b>you</b>",
    "I wonder.</think>Hello",
    "no marks at all < or > [ or {",
    "",
]


def read(parser, pieces):
    """Events with neighbours of one kind joined, as lists."""
    events = [event for piece in pieces for event in parser.feed(piece)] + parser.finish()
    joined: list[list] = []
    for event in events:
        kind = type(event)
        value = (
            event.name
            if kind is CallBegins
            else event.__getattribute__("arguments" if kind is CallGoesOn else "text")
        )
        if joined and joined[-1][0] is kind and kind is not CallBegins:
            joined[-1][1] += value
        else:
            joined.append([kind, value])
    return joined


@st.composite
def cut_texts(draw):
    text = draw(st.sampled_from(TEXTS))
    places = sorted(draw(st.lists(st.integers(0, len(text)), max_size=12)))
    return text, [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]


@pytest.mark.parametrize("name", PARSERS)
@given(cut=cut_texts())
def test_cuts_change_nothing(name, cut):
    text, pieces = cut
    assert read(PARSERS[name](), pieces) == read(PARSERS[name](), [text])


def heard(name, thinks, pieces):
    """What a choice says in all: content, thoughts, calls and why it ended."""
    thinking: Any = {"harmony": Harmony, "think": lambda: Thinking(inside=False)}.get(thinks)
    choice = Choice(
        PARSERS[name](),
        thinking() if thinking else None,
        Strip(["<|eot|>", "[TOOL_CALLS]", "<|python_tag|>"]),
        True,
        lambda: "id",
    )
    whole = Delta(0, 0)
    for i, piece in enumerate(pieces):
        delta = Delta(0, 0, piece, finish_reason="stop" if i == len(pieces) - 1 else None)
        choice.rewrite(delta)
        whole.extend(delta)
    calls = [(call.index, call.name) for call in whole.tool_calls if call.name]
    arguments = {call.index: "" for call in whole.tool_calls}
    for call in whole.tool_calls:
        arguments[call.index] += call.arguments
    return whole.text, whole.reasoning, calls, arguments, whole.finish_reason


@pytest.mark.parametrize("name", ["hermes", "xml", "llama3_json", "mistral", "pythonic"])
@given(
    parts=st.lists(st.sampled_from([*TEXTS, " ", "\n\n", "ok", "<|eot|>"]), max_size=4),
    thinks=st.sampled_from(["", "think", "harmony"]),
    data=st.data(),
)
def test_cuts_change_nothing_of_what_a_choice_says(name, parts, thinks, data):
    text = "".join(parts)
    places = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]
    assert heard(name, thinks, pieces) == heard(name, thinks, [text])
    assert heard(name, thinks, [*text, ""]) == heard(name, thinks, [text])


@pytest.mark.parametrize("name", PARSERS)
@given(text=st.text("<>/[]{}|toolcall_think()=\"' \n", max_size=60), data=st.data())
def test_text_without_calls_comes_out_as_it_went_in(name, text, data):
    at = data.draw(st.integers(0, len(text)))
    events = read(PARSERS[name](), [text[:at], text[at:]])
    assert events == read(PARSERS[name](), [text])
    if name in ("hermes", "xml", "llama3_json", "mistral", "pythonic") and all(
        kind is Text for kind, _ in events
    ):
        assert "".join(value for _, value in events) == text


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("hermes", TEXTS[0], [("f", ARGUMENTS)]),
        ("hermes", TEXTS[1], [("f", ARGUMENTS)] * 2),
        ("hermes", TEXTS[2], [("f", ARGUMENTS)]),
        ("xml", XML, [("f", {"city": "Paris", "days": 3})]),
        ("llama3_json", f"{CALL}; {CALL}", [("f", ARGUMENTS)] * 2),
        ("llama3_json", TEXTS[9], [("f", {})]),
        ("mistral", TEXTS[11], [("f", {"a": 1})]),
        ("mistral", TEXTS[12], [("f", {"a": 1}), ("g", {"b": [2]})]),
        (
            "pythonic",
            TEXTS[14],
            [("f", {"city": "Paris", "days": 3}), ("g.h", {"x": [1, None, True]})],
        ),
        ("harmony", HARMONY, [("f", {"city": "Paris"})]),
        ("required", f"[{CALL}, {CALL}]", [("f", ARGUMENTS)] * 2),
        ("named", '{"city": "Paris"}', [("f", {"city": "Paris"})]),
    ],
)
def test_calls_are_found(name, text, expected):
    events = read(PARSERS[name](), [text])
    names = [value for kind, value in events if kind is CallBegins]
    arguments = [json.loads(value) for kind, value in events if kind is CallGoesOn]
    assert list(zip(names, arguments, strict=True)) == expected


@pytest.mark.parametrize("name", ["hermes", "xml", "llama3_json", "mistral", "pythonic"])
@pytest.mark.parametrize("text", [TEXTS[3], TEXTS[10], TEXTS[13], TEXTS[15], TEXTS[16]])
def test_what_cannot_be_read_is_text(name, text):
    events = read(PARSERS[name](), [text])
    assert events == [[Text, text]]


def test_thoughts_leave_the_answer():
    for text in ("<think>\nI wonder.\n</think>\n\nHello", "\n<think>I wonder.</think>Hello"):
        assert read(Thinking(inside=False), list(text)) == [[Thought, "I wonder."], [Text, "Hello"]]
    assert read(Thinking(inside=True), ["I wonder", ".</th", "ink>\nHello"]) == [
        [Thought, "I wonder."],
        [Text, "Hello"],
    ]
    assert read(Thinking(inside=False), ["Hello <think> no"]) == [[Text, "Hello <think> no"]]
    assert read(Thinking(inside=True), ["cut off in th"]) == [[Thought, "cut off in th"]]


def test_channels_are_told_apart():
    assert read(Harmony(), [TEXTS[18]]) == [[Thought, "Hm."], [Text, "Hi!"]]


@pytest.mark.parametrize("cut", range(14))
def test_what_a_stripped_token_parted_makes_no_new_one(cut):
    strip, whole = Strip(["<|eot|>"]), "<|e<|eot|>ot|>"
    text = strip.feed(whole[:cut]) + strip.feed(whole[cut:]) + strip.finish()
    assert text == "<|eot|>"


def test_special_tokens_are_stripped_wherever_they_are_cut():
    whole = "a<|eot|>b <|e c<|eot|>"
    for at in range(len(whole)):
        strip = Strip(["<|eot|>", "</s>"])
        assert strip.feed(whole[:at]) + strip.feed(whole[at:]) + strip.finish() == "ab <|e c"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1e999}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "f", "arguments": "Paris"}</tool_call>'),
        ("xml", '<tool_call><function=f>{"city": "Paris"}</function></tool_call>'),
        ("llama3_json", '{"name": "Alice", "age": 3}'),  # an answer in JSON
        ("pythonic", "[f()(x=1)]"),
        ("pythonic", "[f(x=1, x=2)]"),
        ("pythonic", "[f(x=1e999)]"),
        ("required", "[oops, [x]"),
        ("required", '[{"name": "f", "param'),
    ],
)
def test_what_is_almost_a_call_is_text_whole(name, text):
    assert read(PARSERS[name](), [text]) == [[Text, text]]


def test_half_a_pair_of_surrogates_can_be_sent():
    for name, text in (
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "\\ud83d"}}</tool_call>'),
        ("pythonic", '[f(a="\\ud83d")]'),
    ):
        [_, (_, arguments)] = read(PARSERS[name](), [text])
        assert arguments.encode() == b'{"a": "\\ud83d"}'


def test_marks_in_a_string_take_no_more_time_the_more_they_are():
    marks = "</tool_call>" * 2000
    text = f'<tool_call>{{"name": "f", "arguments": {{"a": "{marks}"}}}}</tool_call>'
    began = time.process_time()
    events = read(PARSERS["hermes"](), [text[i : i + 4] for i in range(0, len(text), 4)])
    assert [kind for kind, _ in events] == [CallBegins, CallGoesOn]
    assert time.process_time() - began < 5  # minutes, where every piece looks at all of them


@pytest.mark.parametrize(
    ("text", "schema", "expected"),
    [
        ("123", {"type": "string"}, "123"),
        ("123", {"type": "integer"}, 123),
        ("123", {"anyOf": [{"type": "string"}, {"type": "null"}]}, "123"),
        ("null", {"anyOf": [{"type": "string"}, {"type": "null"}]}, None),
        ("123", {"type": ["string", "integer"]}, 123),
        ("3", {"enum": ["3", "4"]}, "3"),
        ("True", {"type": "boolean"}, True),
        ("[1]", None, [1]),
        ("NaN", {"type": "number"}, "NaN"),
    ],
)
def test_unquoted_values_have_the_type_of_the_schema(text, schema, expected):
    assert typed(text, schema) == expected


@pytest.mark.parametrize("size", [1, 4, 30])
def test_thoughts_that_come_with_the_answer_are_counted_by_their_part(size):
    text = "<think>I wonder.</think>Hello."
    choice = Choice(PARSERS["hermes"](), Thinking(inside=False), None, True, lambda: "id")
    for i in range(0, len(text), size):
        piece = text[i : i + size]
        choice.rewrite(Delta(0, 0, piece, list(range(len(piece)))))
    marked = len("<think>I wonder.</think>")  # what opens it counts where it comes whole
    assert marked - len("<think>") <= choice.reasoning_tokens <= marked
