"""Requests that take too long, clients that leave, streams that are silent."""

import socket
import threading
import time

import httpx
import openai
import pytest

from tests.server.conftest import PATIENCE, start

ROUTES = {
    "/v1/completions": {"prompt": "abcd", "max_tokens": 400},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 400},
    "/v1/responses": {"input": "Hi", "max_output_tokens": 400},
    "/v1/messages": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 400},
}


@pytest.fixture(scope="module")
def slow(model):
    """An engine that needs 0.05 s a token: 20 s for these requests."""
    running = start(model, "--sse-keep-alive-interval=0.2", step=0.05)
    yield running
    running.process.terminate()
    running.process.wait(PATIENCE)


@pytest.mark.parametrize("path", ROUTES)
def test_a_request_ends_with_408_at_its_own_time_limit(slow, path):
    began = time.monotonic()
    late = slow.post(path, {**ROUTES[path], "timeout": 0.3})
    error = late.json()["error"]
    kind = "timeout_error" if path == "/v1/messages" else "RequestTimeoutError"
    assert (late.status_code, error["type"]) == (408, kind)
    assert error["message"] == "the request ran into its own time limit of 0.3 s"
    assert time.monotonic() - began < 3
    slow.until(lambda: slow.metric("vllm:num_requests_running") == 0, "its work goes on")


def test_a_stream_past_its_time_limit_ends_with_an_error_frame(slow):
    body = {**ROUTES["/v1/completions"], "timeout": 0.4, "stream": True}
    lines = [line for line in slow.post("/v1/completions", body).text.splitlines() if line]
    assert "its own time limit of 0.4 s" in lines[-2] and lines[-1] == "data: [DONE]"
    assert len([line for line in lines if '"text"' in line]) > 2


def test_the_servers_time_limit_holds_where_a_request_names_none(launch):
    server = launch("--request-timeout=0.3", step=0.05)
    body = ROUTES["/v1/completions"]
    assert server.post("/v1/completions", body).status_code == 408
    assert server.post("/v1/completions", {**body, "max_tokens": 10, "timeout": 9}).is_success
    with pytest.raises(openai.APIStatusError) as caught:
        server.openai().completions.create(model="tiny", prompt="ab", max_tokens=99)
    assert caught.value.status_code == 408


def test_an_engine_that_hangs_does_not_hold_a_request_past_its_limit(launch):
    server = launch()
    began = time.monotonic()
    body = {**ROUTES["/v1/completions"], "cache_salt": "hang", "timeout": 0.5}
    assert server.post("/v1/completions", body).status_code == 408
    assert time.monotonic() - began < 3


@pytest.mark.parametrize("wrong", [0, -1, 1e9, "soon"])
def test_a_time_limit_that_is_none_is_refused(server, wrong):
    refused = server.post("/v1/completions", {"prompt": "a", "timeout": wrong})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "timeout")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ROUTES)
def test_the_work_of_a_client_that_leaves_is_cancelled(slow, path, stream):
    aborted = slow.metric('vllm:request_success_total{engine="0",finished_reason="abort"')
    with pytest.raises(httpx.ReadTimeout):
        with httpx.stream(
            "POST", slow.url + path, json={**ROUTES[path], "stream": stream}, timeout=0.3
        ) as answer:
            began = time.monotonic()
            for _ in answer.iter_raw():
                if time.monotonic() - began > 0.3:
                    raise httpx.ReadTimeout("it left")
    slow.until(lambda: slow.metric("vllm:num_requests_running") == 0, "its work goes on")
    after = slow.metric('vllm:request_success_total{engine="0",finished_reason="abort"')
    assert after == aborted + 1


def test_a_silent_stream_says_that_it_is_alive_while_it_waits(launch):
    server = launch("--sse-keep-alive-interval=0.2", step=1.5)
    with httpx.stream(
        "POST",
        server.url + "/v1/completions",
        json={"prompt": "ab", "max_tokens": 2, "stream": True},
        timeout=PATIENCE,
    ) as answer:
        lines = [line for line in answer.iter_lines() if line]
    first = next(i for i, line in enumerate(lines) if line.startswith("data:"))
    assert first >= 3 and set(lines[:first]) == {": still here"}
    assert lines[-1] == "data: [DONE]"
    text = server.openai().completions.create(model="tiny", prompt="ab", max_tokens=2, stream=True)
    assert "".join(chunk.choices[0].text for chunk in text) == "ab"


def test_a_stream_that_speaks_needs_no_sign_of_life(slow):
    body = {**ROUTES["/v1/completions"], "max_tokens": 20, "stream": True}
    assert "still here" not in slow.post("/v1/completions", body).text


def test_a_thousand_streams_at_once_end_well(launch):
    server = launch(step=0.01)
    host, port = server.url.removeprefix("http://").split(":")
    body = b'{"prompt": "ab", "max_tokens": 30, "stream": true}'
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"
    head += b"content-length: %d\r\n\r\n"
    ends = []

    def ask():
        connections = [socket.create_connection((host, int(port))) for _ in range(250)]
        for one in connections:
            one.sendall(head % len(body) + body)
        for one in connections:
            one.settimeout(PATIENCE)
            answer = b""
            while part := one.recv(65536):
                answer += part
            ends.append(answer.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"))
            one.close()

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ends == [True] * 1000
