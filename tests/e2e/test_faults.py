"""Things that break while serving: a sentence for whoever asked, and the engine serves on."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from octavo import LLM, SamplingParams
from octavo.engine.device import Device
from octavo.engine.recovery import EngineFailure
from tests.e2e.served import ROOT, pages_in_use
from tests.server.conftest import PATIENCE, Server

Launch = Callable[..., Server]
LONG: dict[str, Any] = {"prompt": "abc", "max_tokens": 480, "ignore_eos": True, "temperature": 0}


def answers(server: Server) -> bool:
    body = {"prompt": "abc", "max_tokens": 3, "ignore_eos": True}
    response = server.post("/v1/completions", body)
    return response.status_code == 200 and response.json()["usage"]["completion_tokens"] == 3


def test_bad_requests_are_answered_and_the_engine_serves_on(launch: Launch) -> None:
    server = launch()
    cases: list[tuple[dict[str, Any], str]] = [
        (
            {"prompt": "a" * 600},
            "`prompt` has 600 tokens, the context is 512: shorten it by 89, "
            "or start with a larger --max-model-len",
        ),
        ({"prompt": "a", "max_tokens": 0}, "`max_tokens` must be at least 1 without `echo`, got 0"),
        ({"prompt": "a", "max_tokens": -1}, "`max_tokens` must be at least 1, got -1"),
        ({"prompt": [7, 999]}, "`prompt` has the token 999; ids are from 0 to 258"),
        ({"prompt": ""}, "`prompt` must hold at least one token, got none"),
    ]
    for body, message in cases:
        response = server.post("/v1/completions", body)
        assert (response.status_code, response.json()["error"]["message"]) == (400, message)
    wrong = server.post("/v1/completions", {"prompt": "a", "model": "gpt"})
    assert wrong.status_code == 404
    assert wrong.json()["error"]["message"] == (
        "the model `gpt` does not exist: this server has `tiny`"
    )
    assert answers(server)
    assert server.metric("octavo:compiles_after_ready_total") == 0


def test_a_port_in_use(tiny: Path, launch: Launch) -> None:
    server = launch()
    port = server.url.rsplit(":", 1)[1]
    done = subprocess.run(
        [sys.executable, "-m", "octavo", "serve", str(tiny), "--load-format", "dummy"]
        + ["--port", port],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"error: port {port} on 127.0.0.1 is in use\n"
        f"hint: --port {int(port) + 1}, or --port 0 for a free one\n"
    )
    assert answers(server)


def test_the_pages_of_clients_that_went_away_come_back(launch: Launch) -> None:
    server = launch()
    for _ in range(6):
        with httpx.stream(
            "POST", f"{server.url}/v1/completions", json={**LONG, "stream": True}, timeout=PATIENCE
        ) as response:
            lines = response.iter_lines()
            assert next(lines).startswith("data: ")
    server.until(lambda: server.metric("vllm:num_requests_running") == 0, "somebody still runs")
    server.until(lambda: pages_in_use(server) == 0, "pages are still held")
    assert server.metric("vllm:generation_tokens_total") < 6 * int(str(LONG["max_tokens"]))
    assert answers(server)


def test_sigterm_while_generating_drains_and_exits_with_0(launch: Launch) -> None:
    server = launch()
    with httpx.stream(
        "POST", f"{server.url}/v1/completions", json={**LONG, "stream": True}, timeout=PATIENCE
    ) as response:
        lines = response.iter_lines()
        next(lines)
        server.process.send_signal(signal.SIGTERM)
        rest = [line for line in lines if line]
    assert '"finish_reason":"length"' in rest[-2] and rest[-1] == "data: [DONE]"
    assert server.process.wait(PATIENCE) == 0


def engine_of(server: Server) -> int:
    done = subprocess.run(
        ["pgrep", "-P", str(server.process.pid)], capture_output=True, text=True, check=True
    )
    [pid] = done.stdout.split()
    return int(pid)


def test_a_killed_engine_is_an_error_for_those_who_wait_and_a_503_for_the_rest(
    launch: Launch,
) -> None:
    server = launch()
    ended: list[httpx.Response] = []
    body = LONG
    waiting = threading.Thread(
        target=lambda: ended.append(server.post("/v1/completions", body)), daemon=True
    )
    os.kill(engine_of(server), signal.SIGSTOP)  # so that it is surely not done before it dies
    waiting.start()
    waiting.join(0.5)
    os.kill(engine_of(server), signal.SIGKILL)
    waiting.join(PATIENCE)
    words = (
        "the engine stopped: the engine process was ended by SIGKILL; "
        "the system may have run out of memory"
    )
    assert (ended[0].status_code, ended[0].json()["error"]["message"]) == (500, words)
    for path in ("/health", "/ready"):
        response = server.get(path)
        assert (response.status_code, response.json()["error"]["message"]) == (503, words)
    assert server.post("/v1/completions", LONG).status_code == 503
    server.process.terminate()
    assert server.process.wait(PATIENCE) == 1


def test_ten_thousand_requests_all_finish_or_are_told_to_come_back(launch: Launch) -> None:
    """200 HTTP requests of 50 prompts each, with room for 1,000 in the queue."""
    server = launch("--max-num-queued-reqs", "1000")
    got: list[tuple[int, int]] = []

    def ask(client: httpx.Client) -> None:
        response = client.post("/v1/completions", json={"prompt": ["ab"] * 50, "max_tokens": 8})
        choices = response.json().get("choices", [])
        got.append((response.status_code, len(choices)))
        if response.status_code != 200:
            assert response.status_code == 503 and response.headers["retry-after"] == "1"
            assert "try again later" in response.json()["error"]["message"]

    with httpx.Client(base_url=server.url, timeout=120, limits=httpx.Limits()) as client:
        threads = [threading.Thread(target=ask, args=(client,)) for _ in range(200)]
        os.kill(engine_of(server), signal.SIGSTOP)  # so that the queue surely fills
        for thread in threads:
            thread.start()
        server.until(lambda: (503, 0) in got, "the queue took everything")
        os.kill(engine_of(server), signal.SIGCONT)
        for thread in threads:
            thread.join()
    assert len(got) == 200 and {(200, 50), (503, 0)} == set(got)
    server.until(lambda: pages_in_use(server) == 0, "pages are still held")
    assert server.metric("vllm:num_requests_waiting") == 0
    assert answers(server)
    assert server.metric("octavo:compiles_after_ready_total") == 0


# --- the engine in this process


def open_tiny(tiny: Path, **settings: Any) -> LLM:
    return LLM(str(tiny), load_format="dummy", quiet=True, max_num_seqs=4, **settings)


def test_ten_thousand_prompts_in_one_call_leave_nothing_behind(tiny: Path) -> None:
    with open_tiny(tiny, max_model_len=32) as llm:
        outputs = llm.generate(
            [[5 + i % 200, 7] for i in range(10_000)], SamplingParams(max_tokens=2)
        )
        assert len(outputs) == 10_000 and all(output.finished for output in outputs)
        stats = llm.core.stats()
        assert (stats.running, stats.waiting, stats.in_flight) == (0, 0, 0)
        assert stats.pages_free[0] + stats.pages_cached[0] == stats.pages[0]
        assert not llm.core.host.live and not llm.core.host.children
        assert stats.compiles_after_ready == 0


class FailingSteps:
    """Fault injection: makes `Device.begin` raise at the given calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: set[int]) -> None:
        self.calls = 0
        begin = Device.begin

        def failing(device: Device, launch: Any) -> Any:
            self.calls += 1
            passed = begin(device, launch)  # the state is donated, as in a real failure
            if self.calls in at:
                raise RuntimeError("the device fell off the bus")
            return passed

        monkeypatch.setattr(Device, "begin", failing)


def test_a_step_that_raises_costs_time_and_no_tokens(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [[5, 6, 7], [8] * 30, [9, 10]]
    greedy = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    with open_tiny(tiny) as llm:
        before = [o.outputs[0].token_ids for o in llm.generate(prompts, greedy)]
        FailingSteps(monkeypatch, at={9})
        after = [o.outputs[0].token_ids for o in llm.generate(prompts, greedy)]
        assert after == before
        stats = llm.core.stats()
        assert stats.restarts == 1 and stats.compiles_after_ready == 0
        assert stats.pages_free[0] + stats.pages_cached[0] == stats.pages[0]


def test_a_step_that_raises_twice_ends_the_engine_with_its_reason(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_tiny(tiny) as llm:
        FailingSteps(monkeypatch, at=set(range(3, 100)))
        with pytest.raises(EngineFailure) as caught:
            llm.generate([5, 6, 7], SamplingParams(max_tokens=40, ignore_eos=True))
        assert str(caught.value) == (
            "a step failed again after a restart, with RuntimeError: the device fell off the bus"
        )


def test_leaving_a_stream_early_gives_its_pages_back(tiny: Path) -> None:
    with open_tiny(tiny) as llm:
        stream = llm.stream([5] * 40, SamplingParams(max_tokens=400, ignore_eos=True))
        next(stream)
        stream.close()
        llm.core.drain()
        stats = llm.core.stats()
        assert stats.running == 0
        assert stats.pages_free[0] + stats.pages_cached[0] == stats.pages[0]
        assert stats.generation_tokens < 10
