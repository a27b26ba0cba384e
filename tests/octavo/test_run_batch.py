"""`octavo run-batch` with a real engine: a private server, a file in, a file out."""

import json
from pathlib import Path

import pytest

from octavo.cli import main as cli
from octavo.cli.local_server import local_server
from octavo.engine.config import ConfigError, EngineConfig
from tests.server.tiny_model import write_tiny_model

pytestmark = pytest.mark.smoke


def flags(folder: Path) -> list[str]:
    return [str(write_tiny_model(folder)), "--load-format", "dummy", "--max-num-seqs", "2"]


def test_a_file_of_requests_becomes_a_file_of_answers_in_order(tmp_path: Path) -> None:
    chat = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 3}
    requests = [
        {"custom_id": "c", "method": "POST", "url": "/v1/chat/completions", "body": chat},
        {"custom_id": "b", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x"}},
        {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": 7}},
    ]
    given, found = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    given.write_text("".join(json.dumps(request) + "\n" for request in requests))
    code = cli.main(["run-batch", *flags(tmp_path), "-i", str(given), "-o", str(found)])
    answers = [json.loads(line) for line in found.read_text().splitlines()]
    assert code == 1  # one of them was refused
    assert [answer["custom_id"] for answer in answers] == ["c", "b", "a"]
    assert answers[0]["response"]["body"]["usage"]["completion_tokens"] <= 3
    assert answers[1]["response"]["status_code"] == 200
    assert answers[2]["error"]["code"] == "400"
    assert "prompt" in answers[2]["error"]["message"]


def test_a_server_that_cannot_start_is_an_error_and_not_a_wait(tmp_path: Path) -> None:
    config = EngineConfig(model=str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="the server ended with exit code 2"):
        with local_server(config):
            raise AssertionError("it started")
