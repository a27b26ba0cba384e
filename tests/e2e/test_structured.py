"""Forms of the text through the served engine: what comes back fits, whatever else is asked."""

import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from octavo.cli import main as cli
from tests.e2e.served import end, pages_in_use, serve
from tests.server.conftest import Server
from tests.server.test_structured import deep, slow

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b", None, 1.5]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}


@pytest.fixture(scope="module")
def served(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A model of random weights: whatever fits came from the form alone."""
    log = tmp_path_factory.mktemp("structured") / "log"
    flags = ("--load-format", "dummy", "--served-model-name", "tiny", "--max-num-seqs", "8")
    server = serve(str(tiny), *flags, "--grammar-time-limit", "1.5", log=log)
    yield server
    assert end(server) == 0, log.read_text()


def test_what_ends_by_itself_validates(served: Server) -> None:
    client = served.openai()
    ended = 0
    for seed in range(6):
        answer = client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "hello"}],
            n=3,
            seed=seed,
            max_tokens=300,
            response_format=FORMAT,  # type: ignore[arg-type]
        )
        for choice in answer.choices:
            if choice.finish_reason == "stop":
                ended += 1
                jsonschema.validate(json.loads(choice.message.content), PERSON)
    assert ended >= 6


def test_a_stream_gives_the_same_form(served: Server) -> None:
    stream = served.openai().completions.create(
        model="tiny",
        prompt="call me: ",
        max_tokens=40,
        stream=True,
        extra_body={"structured_outputs": {"regex": r"\(\d{3}\) \d{3}-\d{4}"}},
    )
    text = "".join(chunk.choices[0].text for chunk in stream if chunk.choices)
    assert re.fullmatch(r"\(\d{3}\) \d{3}-\d{4}", text)


def test_bad_forms_between_good_ones_cost_the_good_ones_nothing(served: Server) -> None:
    bad: list[Any] = [{"type": "frog"}, deep(70), {"enum": []}, slow(), {"$ref": "#"}, slow(1)]
    refused: list[int] = []

    def ask_bad() -> None:
        for schema in bad:
            body = {"prompt": "x", "max_tokens": 5, "guided_json": schema}
            refused.append(served.post("/v1/completions", body).status_code)

    thread = threading.Thread(target=ask_bad)
    thread.start()
    good = 0
    while thread.is_alive() or good < 3:
        body = {"prompt": "x", "max_tokens": 9, "guided_choice": ["yes", "no"], "seed": good}
        answer = served.post("/v1/completions", body)
        assert answer.json()["choices"][0]["text"] in ("yes", "no")
        good += 1
    assert refused == [400] * len(bad)
    served.until(lambda: pages_in_use(served) == 0, "pages came back")


def test_a_grammar_that_grows_too_complex_ends_its_request_alone(served: Server) -> None:
    body = {"prompt": "x", "max_tokens": 90, "guided_regex": "(a?b?c?){400}(a|b|c){400}"}
    answer = served.post("/v1/completions", body)
    assert answer.status_code in (200, 400), answer.text
    body = {"prompt": "x", "max_tokens": 9, "guided_choice": ["yes"]}
    assert served.post("/v1/completions", body).json()["choices"][0]["text"] == "yes"


def test_the_command_line_takes_a_schema(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny: Path
) -> None:
    file = tmp_path / "schema.json"
    file.write_text(json.dumps({"enum": ["one", "two"]}))
    words = ["generate", str(tiny), "--load-format", "dummy", "--prompt", "x", "--device", "cpu"]
    assert cli.main([*words, "--json-schema", str(file), "--max-tokens", "9"]) == 0
    assert json.loads(capsys.readouterr().out) in ("one", "two")
    assert cli.main([*words, "--regex", "a", "--choice", "b"]) == 2
    assert "takes exactly one of" in capsys.readouterr().err
