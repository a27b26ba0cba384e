"""Templates that requests bring: only where they may, and never for long."""

import threading
import time

import pytest

from tests.server.conftest import PATIENCE, start

FOREVER = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
HUGE = (
    "{% set ns = namespace(s='ab') %}"
    "{% for i in range(40) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}"
)


def chat(**more):
    return {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, **more}


@pytest.fixture(scope="module")
def trusting(model):
    running = start(model, "--trust-request-chat-template", "--chat-template-timeout=1", step=0.001)
    yield running
    running.process.terminate()
    running.process.wait(PATIENCE)


def test_a_template_in_a_request_is_refused_unless_it_is_allowed(server):
    refused = server.post("/v1/chat/completions", chat(chat_template="{{ 1 }}"))
    error = refused.json()["error"]
    assert (refused.status_code, error["param"]) == (400, "chat_template")
    assert "--trust-request-chat-template" in error["message"]


def test_an_allowed_template_makes_the_prompt(trusting):
    template = "{% for m in messages %}<{{ m.content }}{{ mood }}>{% endfor %}"
    body = chat(chat_template=template, chat_template_kwargs={"mood": "!"})
    answer = trusting.post("/v1/chat/completions", body)
    assert answer.json()["choices"][0]["message"]["content"] == "<Hi!"


def test_a_template_without_end_is_stopped_and_holds_up_nobody(trusting):
    answers = []

    def ask():
        answers.append(trusting.post("/v1/chat/completions", chat(chat_template=FOREVER)))

    thread = threading.Thread(target=ask)
    thread.start()
    slowest = 0.0
    while thread.is_alive():
        began = time.monotonic()
        assert trusting.post("/v1/chat/completions", chat()).status_code == 200
        slowest = max(slowest, time.monotonic() - began)
    thread.join()
    [refused] = answers
    assert refused.status_code == 400
    assert "ran longer than 1 s" in refused.json()["error"]["message"]
    assert slowest < 0.9, "others waited for it"


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (HUGE, "memory"),
        ("{{ messages.__class__.__mro__ }}", "refuses these messages"),
        ("{{ ''.__class__.__base__.__subclasses__() }}", "refuses these messages"),
        ("{% include '/etc/passwd' %}", "refuses these messages"),
        ("{% for %}", "not valid Jinja"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "calls itself too often"),
        ("{{ 'a' * 20000000 }}", "made more than"),
    ],
)
def test_a_template_that_reaches_for_too_much_is_refused(trusting, template, why):
    refused = trusting.post("/v1/chat/completions", chat(chat_template=template))
    assert refused.status_code == 400
    assert why in refused.json()["error"]["message"]
    good = trusting.post("/v1/chat/completions", chat(chat_template="{{ messages[0].content }}"))
    assert good.status_code == 200
