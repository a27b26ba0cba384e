"""GET /, its files, and /live: what a browser gets, over the real sockets of a fake engine."""

import base64
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest

from octavo.engine.messages import FIRST_SLOT, PageMap, Stats, View, Watch
from octavo.engine.watchers import Watchers
from octavo.server.live import LiveFrames
from octavo.server.views import MOST_WATCHERS, Watcher
from tests.server.conftest import PATIENCE

PAGE = Path(__file__).resolve().parents[2] / "server" / "page"
CHAT = {"messages": [{"role": "user", "content": "Hi there"}], "max_tokens": 300}


def events(response: httpx.Response) -> Iterator[dict[str, Any]]:
    for line in response.iter_lines():
        if line.startswith("data: {"):
            yield json.loads(line.removeprefix("data: "))


def live(server, **options):
    return httpx.stream("GET", server.url + "/live", timeout=PATIENCE, **options)


def view(cells: list[int], hits: list[int] | None = None) -> View:
    raw = np.array(cells, "<u4").tobytes()
    page_map = PageMap(len(cells), 0, 1, raw, np.array(hits or [], "<u4").tobytes())
    return View(1.0, Stats(), 16, [page_map], b"")


def test_the_page_and_its_files_are_served_with_a_strict_policy(server):
    page = server.get("/")
    assert page.headers["content-type"].startswith("text/html")
    named = set(re.findall(r'(?:src|href)="(page/[^"]+)"', page.text))
    assert {"page/app.js", "page/app.css", "page/icon.svg"} == named
    for name in [path.name for path in PAGE.iterdir()]:
        answer = server.get(f"/page/{name}")
        assert answer.status_code == 200 and answer.content == (PAGE / name).read_bytes()
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert "unsafe" not in answer.headers["content-security-policy"]
        assert answer.headers["x-content-type-options"] == "nosniff"
        known = {"if-none-match": answer.headers["etag"]}
        assert httpx.get(server.url + f"/page/{name}", headers=known).status_code == 304
    for other in ("/page/nothing.js", "/page/..%2Fapp.py", "/page/%2e%2e/app.py"):
        assert server.get(other).status_code == 404


def test_nothing_in_the_page_is_inline_or_from_elsewhere_or_becomes_markup():
    page = (PAGE / "index.html").read_text()
    assert not re.search(r"\son\w+=|\sstyle=|<script(?![^>]*src=)|<style", page)
    for path in PAGE.iterdir():
        text = path.read_text().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|//cdn", text), path
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|eval\(", text), path


def test_live_tells_the_state_then_views_in_which_work_shows(server):
    with live(server) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        stream = events(response)
        state = next(stream)
        assert (state["kind"], state["state"], state["mode"]) == ("state", "ready", "chat")
        assert (state["model"], state["max_model_len"]) == ("tiny", 512)
        first = next(stream)
        assert first["kind"] == "view" and first["maps"][0]["count"] == 101
        assert len(base64.b64decode(first["maps"][0]["cells"])) == 4 * 101
        worker = threading.Thread(target=server.post, args=("/v1/chat/completions", CHAT))
        worker.start()
        busy = next(v for v in stream if v["stats"]["running"])
        assert busy["slots"][0][0] == 0 and busy["maps"][0]["hits"] == [1]
        assert busy["maps"][0]["at"] == [1] and busy["maps"][0]["to"] == [FIRST_SLOT]
        worker.join()
        later = next(v for v in stream if not v["stats"]["running"])
        assert later["stats"]["generation_tokens"] > first["stats"]["generation_tokens"]


def test_the_engine_sends_views_only_while_somebody_watches(server):
    def steps(seconds: float) -> list[float]:
        with live(server) as response:
            began, times = time.monotonic(), []
            for event in events(response):
                if event["kind"] == "view":
                    times.append(event["time"])
                if time.monotonic() - began > seconds:
                    return times
        return []

    times = steps(1.5)
    assert 4 <= len(times) <= 11, times
    gaps = np.diff(times)
    assert np.median(gaps) > 0.05


def test_a_client_asks_for_a_while_and_the_shortest_time_between_views_counts():
    watchers = Watchers()
    assert watchers.due == float("inf") and not watchers
    watchers.renew(0, Watch(3.0, 1.0), now=10.0)
    watchers.renew(1, Watch(1.0, 0.2), now=10.0)
    assert watchers.due == 10.0 and watchers.take(10.0) == [0, 1]
    assert watchers.due == pytest.approx(10.2)
    assert watchers.take(11.5) == [0] and watchers.due == pytest.approx(12.5)
    watchers.renew(0, Watch(0.0), now=12.0)
    assert not watchers and watchers.due == float("inf")
    watchers.renew(0, Watch(1.0, 1e-9), now=13.0)
    watchers.take(13.0)
    assert watchers.due >= 13.1  # nobody makes the engine send views all the time
    assert watchers.take(15.0) == [] and watchers.due == float("inf")


async def test_a_slow_reader_gets_the_newest_view_with_the_hits_that_it_missed():
    watcher = Watcher()
    watcher.put(view([3, 0, 0], hits=[1]))
    watcher.put(view([3, 4, 4], hits=[2]))
    got = await watcher.take(1.0)
    assert got is not None
    assert np.frombuffer(got.maps[0].cells, "<u4").tolist() == [3, 4, 4]
    assert np.frombuffer(got.maps[0].hits, "<u4").tolist() == [1, 2]
    assert await watcher.take(0.01) is None


def test_only_cells_that_changed_are_told_again():
    frames, cells = LiveFrames(), [3] + [0] * 99

    def told(cells: list[int]) -> dict[str, Any]:
        frame = frames.view(view(cells))
        return msgspec.json.decode(frame.removeprefix(b"data: "))["maps"][0]

    assert "cells" in told(cells)
    cells[7] = 5
    changed = told(cells)
    assert (changed["at"], changed["to"], "cells" in changed) == ([7], [5], False)
    assert "cells" in told([3] + [9] * 99)
    assert "cells" in told([3] + [9] * 120)  # another engine's map


def test_more_readers_than_allowed_are_told_to_come_back(launch):
    server = launch()
    host, port = server.url.removeprefix("http://").split(":")

    def reader() -> tuple[socket.socket, bytes]:
        connection = socket.create_connection((host, int(port)), timeout=PATIENCE)
        connection.sendall(b"GET /live HTTP/1.1\r\nhost: octavo\r\n\r\n")
        return connection, connection.recv(4096)

    def leaves() -> bytes:
        connection, answer = reader()
        connection.close()
        return answer

    readers = [reader() for _ in range(MOST_WATCHERS)]
    assert all(answer.startswith(b"HTTP/1.1 200") for _, answer in readers)
    refused = leaves()
    assert refused.startswith(b"HTTP/1.1 503") and b"retry-after" in refused
    readers[0][0].close()
    server.until(lambda: leaves().startswith(b"HTTP/1.1 200"), "a place that was left stays taken")
    for connection, _ in readers[1:]:
        connection.close()


def test_live_needs_the_key_and_the_page_does_not(launch):
    server = launch("--api-key", "secret")
    assert server.get("/").status_code == server.get("/page/app.js").status_code == 200
    assert server.get("/live").status_code == 401
    with live(server, headers={"authorization": "Bearer secret"}) as response:
        assert next(events(response))["state"] == "ready"


def test_a_reader_does_not_hold_up_the_end_of_the_server(launch):
    server = launch()
    with live(server) as response:
        stream = events(response)
        next(stream)
        server.process.terminate()
        assert list(stream) is not None
    assert server.process.wait(10) == 0


def test_every_api_process_shows_the_engine(launch):
    server = launch("--api-server-count", "2", step=0.001)
    for _ in range(6):
        with live(server) as response:
            kinds = [event["kind"] for event in islice(events(response), 4)]
            assert kinds[0] == "state" and "view" in kinds, kinds  # one may begin a moment later


def test_the_end_of_the_engine_is_told(launch):
    server = launch()
    with live(server) as response:
        stream = events(response)
        assert next(stream)["state"] == "ready"
        server.post("/v1/chat/completions", {**CHAT, "cache_salt": "die"})
        stopped = next(event for event in stream if event["kind"] == "state")
    assert stopped["state"] == "stopped"
    assert "the device fell off the bus" in stopped["message"]
