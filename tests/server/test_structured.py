"""Forms of the text through the real server: who may ask how, and what a bad one costs others."""

import json
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.server.conftest import Server

POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer"}, "y": {"type": "integer"}},
    "required": ["x", "y"],
}
TAG = {
    "type": "structural_tag",
    "structures": [{"begin": "<f>", "schema": POINT, "end": "</f>"}],
    "triggers": ["<f"],
}


def slow(seed: int = 0) -> dict[str, Any]:
    """A small schema that takes many seconds: every `multipleOf` is an automaton of its own."""
    numbers = {f"k{i}": {"type": "integer", "multipleOf": 99991 - 2 * i - seed} for i in range(60)}
    return {"type": "object", "properties": numbers}


def deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(levels):
        schema = {"not": schema}
    return schema


def ask(server: Server, **fields: Any) -> Any:
    body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4} | fields
    return server.post("/v1/chat/completions", body)


@pytest.mark.parametrize(
    "form",
    [
        {"response_format": {"type": "text"}},
        {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "json_object", "schema": POINT}},
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "point", "schema": POINT, "strict": True},
            }
        },
        {"response_format": {"type": "json_schema", "name": "point", "schema": POINT}},
        {"response_format": TAG},
        {"structured_outputs": {"json": POINT}},
        {"structured_outputs": {"json": json.dumps(POINT), "disable_any_whitespace": True}},
        {"structured_outputs": {"json_object": True}},
        {"structured_outputs": {"regex": r"\d{3}"}},
        {"structured_outputs": {"choice": ["yes", "no"]}},
        {"structured_outputs": {"grammar": 'root ::= "a" | "b" root'}},
        {"structured_outputs": {"grammar": 'start: "a"+'}},
        {"structured_outputs": {"structural_tag": json.dumps(TAG)}},
        {"guided_json": POINT},
        {"guided_json": POINT, "guided_whitespace_pattern": "[ ]?"},
        {"guided_regex": "[a-z]+"},
        {"guided_choice": ["a", "b"]},
        {"guided_grammar": 'start: "a"+'},
    ],
    ids=lambda form: json.dumps(form)[:60],
)
def test_every_spelling_of_a_form_is_taken(server: Server, form: dict[str, Any]) -> None:
    assert ask(server, **form).status_code == 200
    body = {"prompt": "hello", "max_tokens": 4} | form
    assert server.post("/v1/completions", body).status_code == 200


@pytest.mark.parametrize(
    ("form", "says"),
    [
        ({"response_format": {"type": "xml"}}, "must be one of"),
        ({"response_format": {"type": "json_schema"}}, "json_schema.schema` is required"),
        ({"guided_json": {"type": "frog"}}, "frog"),
        ({"guided_json": "{"}, "is not JSON"),
        ({"guided_regex": "(a"}, "unclosed group"),
        ({"guided_choice": []}, "at least one `choice`"),
        ({"guided_grammar": 'start: "a" b'}, "unknown name"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "takes exactly one of"),
        ({"structured_outputs": {"rexeg": "a"}}, "has no field `rexeg`"),
        ({"structured_outputs": {"structural_tag": "{}"}}, "needs `format`"),
        ({"structured_outputs": {"json": deep(70)}}, "at most 64 levels deep"),
        ({"structured_outputs": {"json": json.dumps(deep(70))}}, "at most 64 levels deep"),
        ({"structured_outputs": {"json": "[" * 100_000}}, "at most 64 levels deep"),
        ({"guided_json": {"enum": ["x" * 1_100_000]}}, "at most 1,048,576 characters"),
        ({"guided_json": {"allOf": [{"type": "string"}, {"type": "null"}]}}, "Unsatisfiable"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_a_form_that_cannot_work_is_a_400_that_names_its_field(
    server: Server, form: dict[str, Any], says: str
) -> None:
    response = ask(server, **form)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, next(iter(form)))
    assert says in error["message"] and next(iter(form)) in error["message"]


def test_two_forms_at_once_are_refused(server: Server) -> None:
    response = ask(server, guided_regex="a", response_format={"type": "json_object"})
    assert response.status_code == 400
    assert "exclude each other" in response.json()["error"]["message"]


def test_a_form_that_is_too_slow_is_refused_in_time_and_holds_nobody_up(
    launch: Callable[..., Server],
) -> None:
    server = launch("--grammar-time-limit", "1.5")
    assert ask(server, guided_regex="a+").status_code == 200  # the helper is there
    answers: list[Any] = []
    began = time.monotonic()
    threads = [
        threading.Thread(target=lambda i=i: answers.append(ask(server, guided_json=slow(i))))
        for i in range(2)
    ]
    for thread in threads:
        thread.start()
    waits: list[float] = []
    while any(thread.is_alive() for thread in threads):
        for i, form in enumerate(({}, {"guided_regex": f"b{{{len(waits) + 1}}}"})):
            asked = time.monotonic()
            assert ask(server, **form).status_code == 200, i
            waits.append(time.monotonic() - asked)
    assert time.monotonic() - began < 8.0
    for answer in answers:
        assert answer.status_code == 400
        assert "takes longer than 1.5 s to compile" in answer.json()["error"]["message"]
    assert len(waits) >= 6 and sorted(waits)[len(waits) // 2] < 0.5
    asked = time.monotonic()
    assert ask(server, guided_json=slow()).status_code == 400
    assert time.monotonic() - asked < 0.5, "a verdict is remembered"
