"""API keys: who may ask what, and how a refusal looks."""

import os

import httpx
import openai
import pytest

from octavo.engine.config import ConfigError
from octavo.server.keys import needs_key, with_all_keys
from octavo.server.settings import ServerSettings
from tests.server.conftest import PATIENCE

CHAT = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
OPEN = ("/health", "/ping", "/ready", "/metrics")


@pytest.fixture(scope="module")
def keyed(model, tmp_path_factory):
    from tests.server.conftest import start

    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text("# the team's\n\nthree\nfour\n")
    os.environ["OCTAVO_API_KEY"] = "five"
    try:
        running = start(model, "--api-key=one", "--api-key=two", f"--api-key-file={file}")
    finally:
        del os.environ["OCTAVO_API_KEY"]
    yield running
    running.process.terminate()
    running.process.wait(PATIENCE)


def ask(server, path="/v1/chat/completions", **headers):
    return httpx.post(server.url + path, json=CHAT, headers=headers, timeout=PATIENCE)


@pytest.mark.parametrize("key", ["one", "two", "three", "four", "five"])
def test_every_key_opens_in_either_header(keyed, key):
    assert ask(keyed, **{"authorization": f"Bearer {key}"}).status_code == 200
    assert ask(keyed, **{"Authorization": f"bearer  {key}"}).status_code == 200
    assert ask(keyed, **{"x-api-key": key}).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [{}, {"authorization": "Bearer six"}, {"authorization": "Basic one"}, {"x-api-key": "on"}],
)
def test_without_a_key_every_route_is_401_in_openais_shape(keyed, headers):
    for path in ("/v1/chat/completions", "/v1/models", "/tokenize", "/version", "/nothing"):
        refused = ask(keyed, path, **headers)
        assert refused.status_code == 401, path
        assert refused.headers["www-authenticate"] == "Bearer"
        error = refused.json()["error"]
        assert (error["type"], error["code"]) == ("AuthenticationError", 401)
        assert "missing or wrong" in error["message"]
    anthropic = ask(keyed, "/v1/messages", **headers)
    assert (anthropic.status_code, anthropic.json()["type"]) == (401, "error")
    assert anthropic.json()["error"]["type"] == "authentication_error"


def test_a_client_of_openai_understands_the_refusal(keyed):
    with pytest.raises(openai.AuthenticationError, match="missing or wrong"):
        keyed.openai("six").models.list()
    assert keyed.openai("two").models.list().data[0].id == "tiny"


def test_probes_and_metrics_are_open_to_all(keyed):
    assert [keyed.get(path).status_code for path in OPEN] == [200] * len(OPEN)


def test_a_flag_closes_the_metrics_too(launch):
    server = launch("--api-key=one", "--guard-metrics")
    assert server.get("/metrics").status_code == 401
    assert server.get("/ready").status_code == 200
    known = httpx.get(server.url + "/metrics", headers={"authorization": "Bearer one"})
    assert known.status_code == 200


def test_the_pages_own_files_are_open_and_its_figures_are_not():
    settings = ServerSettings(api_key=["one"])
    assert [needs_key(settings, path) for path in ("/", "/page/page.js", "/live")] == [
        False,
        False,
        True,
    ]


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (ServerSettings(api_key=["two words"]), "printable ASCII"),
        (ServerSettings(api_key=[""]), "not empty"),
        (ServerSettings(api_key_file="/nowhere/keys"), "/nowhere/keys cannot be read"),
        (ServerSettings(api_key_file="/dev/null"), "/dev/null holds no key"),
        (ServerSettings(guard_metrics=True), "--guard-metrics needs an API key"),
    ],
)
def test_keys_that_cannot_work_are_refused_at_start(settings, why):
    with pytest.raises(ConfigError, match=why):
        with_all_keys(settings)


def test_no_page_of_elsewhere_may_call_unless_it_is_named(launch, server):
    asked = {"origin": "https://a.example", "access-control-request-method": "POST"}
    preflight = httpx.options(server.url + "/v1/completions", headers=asked)
    assert "access-control-allow-origin" not in preflight.headers
    named = launch("--cors-origin", "https://a.example", "--api-key", "one")
    preflight = httpx.options(named.url + "/v1/completions", headers=asked)
    assert preflight.headers["access-control-allow-origin"] == "https://a.example"
    refused = ask(named, origin="https://a.example")
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == "https://a.example"
    other = httpx.options(named.url + "/v1/completions", headers={**asked, "origin": "https://b"})
    assert "access-control-allow-origin" not in other.headers
