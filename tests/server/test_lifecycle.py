"""Starting, stopping, breaking: what the person who runs the server sees."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from tests.server.conftest import PATIENCE, Server

Launch = Callable[..., Server]
ROOT = Path(__file__).parent.parent.parent
CHAT = {"messages": [{"role": "user", "content": "Hi"}]}
METRICS = """
vllm:num_requests_running vllm:num_requests_waiting vllm:kv_cache_usage_perc
vllm:prompt_tokens_total vllm:generation_tokens_total vllm:num_preemptions_total
vllm:prefix_cache_queries_total vllm:prefix_cache_hits_total vllm:request_success_total
vllm:time_to_first_token_seconds_bucket vllm:inter_token_latency_seconds_sum
vllm:e2e_request_latency_seconds_count vllm:request_queue_time_seconds_bucket
octavo:compiles_after_ready_total octavo:stalled_reads_total octavo:steps_total
octavo:steps_in_flight octavo:host_seconds_total octavo:pages
""".split()


def test_no_api_process_imports_jax() -> None:
    program = (
        "import sys, octavo.cli.serve, octavo.server.worker, octavo.server.app\n"
        "heavy = {'jax', 'jaxlib', 'flax', 'torch', 'transformers'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_metrics_have_the_names_that_dashboards_know(server: Server) -> None:
    server.post("/v1/chat/completions", {**CHAT, "max_tokens": 3})
    text = server.get("/metrics").text
    missing = [name for name in METRICS if f"\n{name}{{" not in text]
    assert missing == []
    assert 'engine="0",model_name="tiny"' in text


def test_the_start_up_lines_say_where_and_how_to_try(launch: Launch) -> None:
    server = launch()
    server.process.terminate()
    out, err = server.process.communicate(timeout=PATIENCE)
    lines = out.splitlines()
    assert lines[0].startswith("octavo ") and lines[0].endswith("serves tiny")
    assert lines[-2].startswith(f"listening on {server.url}, ready in ")
    assert lines[-1].startswith(f"try: curl {server.url}/v1/chat/completions")
    assert (err, server.process.returncode) == ("", 0)


def test_a_port_in_use_is_one_sentence_and_exit_code_2(launch: Launch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        refused = launch("--port", str(port), wait=False)
        out, err = refused.process.communicate(timeout=PATIENCE)
    assert refused.process.returncode == 2 and out == ""
    assert err.startswith(f"error: port {port} on 127.0.0.1 is in use\n")
    assert f"--port {port + 1}" in err and "Traceback" not in err


def test_an_engine_that_cannot_start_says_why_and_exits_with_2(launch: Launch) -> None:
    refused = launch("--num-pages", "3", wait=False)
    _, err = refused.process.communicate(timeout=PATIENCE)
    assert refused.process.returncode == 2
    assert err == "error: the cache does not fit\nhint: --num-pages 0 takes what memory allows\n"


def test_an_unknown_model_is_told_before_the_engine_starts(launch: Launch, tmp_path: Path) -> None:
    refused = launch("--model", str(tmp_path / "nothing"), wait=False)
    _, err = refused.process.communicate(timeout=PATIENCE)
    assert refused.process.returncode == 2 and "Traceback" not in err


def test_sigterm_lets_a_stream_finish_and_exits_with_0(launch: Launch) -> None:
    server = launch(step=0.005)
    with httpx.stream(
        "POST",
        f"{server.url}/v1/chat/completions",
        json={**CHAT, "max_tokens": 200, "stream": True},
        timeout=PATIENCE,
    ) as response:
        lines = response.iter_lines()
        next(lines)
        server.process.send_signal(signal.SIGTERM)
        rest = list(lines)
    frames = [line for line in rest if line.startswith("data: {")]
    assert len(frames) > 150 and '"finish_reason":"length"' in frames[-1]
    assert "data: [DONE]" in rest
    assert server.process.wait(PATIENCE) == 0


def test_after_the_shutdown_timeout_a_stream_ends_with_an_error(launch: Launch) -> None:
    server = launch("--shutdown-timeout", "0.5", step=0.05)
    with httpx.stream(
        "POST",
        f"{server.url}/v1/chat/completions",
        json={**CHAT, "stream": True},
        timeout=PATIENCE,
    ) as response:
        lines = response.iter_lines()
        next(lines)
        server.process.send_signal(signal.SIGTERM)
        rest = [line for line in lines if line]
    assert "the server is shutting down" in rest[-2] and rest[-1] == "data: [DONE]"
    assert server.process.wait(PATIENCE) == 0


def test_a_dead_engine_is_an_error_for_all_and_a_503_with_its_last_words(launch: Launch) -> None:
    server = launch(step=0.01)
    bodies = [{**CHAT, "stream": True}, {**CHAT, "cache_salt": "die"}]
    answers: dict[int, httpx.Response] = {}

    def ask(i: int) -> None:
        answers[i] = server.post("/v1/chat/completions", bodies[i])

    first = threading.Thread(target=ask, args=(0,))
    first.start()
    time.sleep(0.3)
    ask(1)
    first.join()
    words = "the engine stopped: RuntimeError: the device fell off the bus"
    assert words in answers[0].text and answers[0].text.endswith("data: [DONE]\n\n")
    assert (answers[1].status_code, answers[1].json()["error"]["message"]) == (500, words)
    for path in ("/health", "/ready"):
        response = server.get(path)
        assert (response.status_code, response.json()["error"]["message"]) == (503, words)
    assert server.post("/v1/chat/completions", CHAT).status_code == 503
    server.process.terminate()
    assert server.process.wait(PATIENCE) == 1


def test_a_killed_engine_is_noticed(launch: Launch) -> None:
    server = launch()
    [engine] = subprocess.run(
        ["pgrep", "-P", str(server.process.pid)], capture_output=True, text=True
    ).stdout.split()
    os.kill(int(engine), signal.SIGKILL)
    server.until(lambda: server.get("/health").status_code == 503, "it is still healthy")
    assert "SIGKILL" in server.get("/health").json()["error"]["message"]


def test_a_hung_engine_is_not_healthy(launch: Launch) -> None:
    server = launch("--hung-after", "1")
    with pytest.raises(httpx.ReadTimeout):
        body = {**CHAT, "cache_salt": "hang"}
        httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=0.3)
    assert server.get("/health").status_code == 200
    server.until(lambda: server.get("/health").status_code == 503, "it is still healthy")
    assert "has not answered for" in server.get("/health").json()["error"]["message"]


def test_what_waits_beyond_the_queue_is_told_to_come_back(launch: Launch) -> None:
    server = launch("--max-num-queued-reqs", "8", step=0.3)
    statuses: list[tuple[int, str | None]] = []

    def ask() -> None:
        response = server.post("/v1/completions", {"prompt": ["a"] * 6, "max_tokens": 1})
        statuses.append((response.status_code, response.headers.get("retry-after")))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (503, "1") in statuses and (200, None) in statuses
    assert server.get("/health").status_code == 200


def test_several_api_processes_share_one_port_and_one_engine(launch: Launch) -> None:
    server = launch("--api-server-count", "2", step=0.001)
    texts = [
        server.post("/v1/completions", {"prompt": f"{i},", "max_tokens": 6}).json()
        for i in range(12)
    ]
    assert [t["choices"][0]["text"] for t in texts] == [(f"{i}," * 3)[:6] for i in range(12)]
    server.process.terminate()
    assert server.process.wait(PATIENCE) == 0


def test_api_processes_end_with_the_process_that_started_them(launch):
    server = launch("--api-server-count", "2")
    parent = server.process.pid
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    assert len(children) == 3, "two API processes and the engine"
    server.process.kill()
    server.process.wait()
    server.until(
        lambda: not any(_runs(pid) for pid in children), f"{children} outlive their parent"
    )


def _runs(pid: str) -> bool:
    """Whether a process is there and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
