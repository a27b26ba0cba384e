"""Replicas that Ray Serve starts, scales and replaces, a fake engine in each: `make deploy`."""

import json
import os
import signal
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.server.conftest import free_port
from tests.server.tiny_model import write_tiny_model

ray = pytest.importorskip("ray", reason="needs Ray: make deploy, or pip install 'octavo[ray]'")

ROOT = Path(__file__).resolve().parents[2]
MARK = f"OCTAVO_TEST_MARK={uuid.uuid4().hex}"  # in the environment of every process of this test
PATIENCE = 60.0  # seconds
LONG = {"prompt": "abcd", "max_tokens": 400}  # 4 s
SETTINGS = {
    "core": "tests.server.fake_engine:FakeCore",
    "load_format": "dummy",
    "served_model_name": "tiny",
    "max_replicas": "2",
    "target_ongoing_requests": "4",
    "max_ongoing_requests": "8",
    "upscale_delay": "0.5",
    "look_back": "11",
    "cpus": "0.1",
}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of one application with one replica, and room for another."""
    from ray import serve

    from octavo.ray_serve import build

    name, _, value = MARK.partition("=")
    with pytest.MonkeyPatch.context() as patch:
        for key, text in (
            (name, value),
            ("PYTHONPATH", str(ROOT)),
            ("FAKE_STEP_SECONDS", "0.01"),
            ("RAY_AUTH_MODE", "disabled"),
            ("RAY_USAGE_STATS_ENABLED", "0"),
            ("RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S", "0.5"),
            ("RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S", "0.5"),
        ):
            patch.setenv(key, text)
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
        port = free_port()
        serve.start(http_options={"port": port})
        folder = write_tiny_model(tmp_path_factory.mktemp("tiny"))
        serve.run(build({"model": str(folder), **SETTINGS}), name="octavo")
        yield f"http://127.0.0.1:{port}"
        serve.shutdown()
        ray.shutdown()
        until(lambda: not engines(), "no engine outlives Ray")


def until(holds, what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < end, what
        time.sleep(0.1)


def processes(command: str) -> list[int]:
    """Our own processes whose command line has this in it."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdecimal() and command in (folder / "cmdline").read_text():
                if MARK in (folder / "environ").read_text():
                    found.append(int(folder.name))
        except OSError:  # it ended, or is not ours
            continue
    return found


def engines() -> list[int]:
    return processes("octavo.engine.process")


def replicas() -> list[int]:
    return processes("ray::ServeReplica:octavo:Engine")


def running(url: str) -> set[str]:
    """The replicas that answer."""
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    named = [line for line in lines if line.startswith("octavo:slots")]
    return {line.partition('replica="')[2].partition('"')[0] for line in named}


def ask(url: str) -> httpx.Response:
    return httpx.post(f"{url}/v1/completions", json=LONG, timeout=PATIENCE)


def stream(url: str) -> list[dict]:
    """The events of a stream that ended as it should."""
    body = {**LONG, "stream": True}
    text = httpx.post(f"{url}/v1/completions", json=body, timeout=PATIENCE).text
    events = text.strip().split("\n\n")
    assert events.pop() == "data: [DONE]"
    return [json.loads(event.removeprefix("data: ")) for event in events]


def test_one_address_scales_and_outlives_a_replica(url):
    assert len(running(url)) == len(engines()) == 1
    short = {"prompt": "abcd", "max_tokens": 4}
    got = httpx.post(f"{url}/v1/completions", json=short)
    assert got.json()["choices"][0]["text"] == "abcd"
    assert len(got.headers.get_list("x-request-id")) == 1

    with ThreadPoolExecutor(48) as pool:
        load = [pool.submit(ask, url) for _ in range(32)]
        until(lambda: len(running(url)) == 2, "a second replica under load")
        assert [answer.result().status_code for answer in load] == [200] * 32

        streams = [pool.submit(stream, url) for _ in range(6)]
        whole = [pool.submit(ask, url) for _ in range(6)]
        until(lambda: len(replicas()) == 2, "two replica processes")
        time.sleep(1.5)
        victim = replicas()[0]
        os.kill(victim, signal.SIGKILL)
        answers = [answer.result() for answer in whole]
        ended = [one.result() for one in streams]

    assert [answer.status_code for answer in answers] == [200] * 6, "asked for again"
    assert {a.json()["usage"]["completion_tokens"] for a in answers} == {400}
    cut = [events for events in ended if "error" in events[-1]]
    assert 0 < len(cut) < len(ended), "those of the replica that ended, and no others"
    assert all("ended; ask again" in events[-1]["error"]["message"] for events in cut)
    assert all(len(events) > 1 for events in cut), "something had come before"
    until(lambda: len(running(url)) == 2 and victim not in replicas(), "another in its place")
    until(lambda: len(engines()) == 2, "the engine of the one that ended has ended too")


def test_a_replica_whose_engine_ends_is_replaced_and_nobody_notices(url):
    with ThreadPoolExecutor(8) as pool:
        whole = [pool.submit(ask, url) for _ in range(8)]
        time.sleep(1.0)
        os.kill(engines()[0], signal.SIGKILL)
        assert [answer.result().status_code for answer in whole] == [200] * 8


def test_what_the_proxy_does_not_know_is_answered_by_the_server(url):
    assert httpx.get(f"{url}/nothing").json()["error"]["type"] == "NotFoundError"
    assert httpx.get(f"{url}/v1/models").json()["data"][0]["id"] == "tiny"
    body = {"model": "tiny", "input": "ab", "store": True, "max_output_tokens": 4}
    kept = httpx.post(f"{url}/v1/responses", json=body)
    assert httpx.get(f"{url}/v1/responses/{kept.json()['id']}").status_code == 404


def busy(url: str) -> int:
    """Requests that have not ended, of all replicas."""
    return int(httpx.get(f"{url}/load").json()["server_load"])


@pytest.mark.parametrize("streams", [True, False])
def test_a_client_that_leaves_takes_its_work_along(url, streams):
    until(lambda: busy(url) == 0, "nothing is left of other tests")
    with httpx.Client(timeout=PATIENCE) as client:
        body = {**LONG, "stream": streams, "max_tokens": 500}
        if streams:
            with client.stream("POST", f"{url}/v1/completions", json=body) as answer:
                pieces = answer.iter_bytes()  # once it is forgotten, the connection is closed
                next(pieces)
                assert busy(url) == 1
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post(f"{url}/v1/completions", json=body, timeout=1.0)
    left = time.monotonic()
    until(lambda: busy(url) == 0, "the engine has nothing to do")
    assert time.monotonic() - left < 3, "it would have taken 5 s"
