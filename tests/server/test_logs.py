"""What the server's log says of requests, and what it never says."""

import json

import httpx
import pytest

from tests.server.conftest import PATIENCE


def stop(server):
    """What it wrote to stderr."""
    server.process.terminate()
    _, err = server.process.communicate(timeout=PATIENCE)
    return err.splitlines()


def ask(server):
    body = {"messages": [{"role": "user", "content": "a secret"}], "max_tokens": 5}
    headers = {"x-request-id": "mine"}
    httpx.post(f"{server.url}/v1/chat/completions", json=body, headers=headers, timeout=PATIENCE)
    server.post("/v1/completions", {"prompt": "secret", "temperature": -1})
    server.get("/nothing")


def test_a_request_is_one_line_without_its_text(launch):
    server = launch("--enable-log-requests", step=0.01)
    ask(server)
    good, refused, unknown = stop(server)
    words = dict(word.split("=") for word in good.removeprefix("octavo: ").split())
    assert words.items() >= {
        ("id", "chatcmpl-mine"),
        ("method", "POST"),
        ("route", "/v1/chat/completions"),
        ("status", "200"),
        ("output_tokens", "5"),
        ("finish", "length"),
    }
    assert 0.0 < float(words["first_token"]) < float(words["seconds"]) < 5
    assert int(words["prompt_tokens"]) > 0
    assert "route=/v1/completions status=400" in refused
    assert "route=none status=404" in unknown
    assert not any("secret" in line or "nothing" in line for line in (good, refused, unknown))


@pytest.mark.parametrize("count", ["1", "2"])
def test_json_lines_have_the_same_facts(launch, count):
    server = launch("--enable-log-requests", "--log-json", "--api-server-count", count)
    ask(server)
    lines = [json.loads(line) for line in stop(server)]
    good = next(line for line in lines if line["id"] == "chatcmpl-mine")
    assert (good["level"], good["logger"], good["status"]) == ("info", "octavo.requests", 200)
    assert (good["output_tokens"], good["finish"]) == (5, "length")
    assert good["time"].endswith("Z") and good["message"].startswith("id=chatcmpl-mine")


def test_without_the_flag_nothing_is_logged(launch):
    server = launch()
    ask(server)
    assert stop(server) == []
