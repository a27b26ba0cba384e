"""What /metrics says is true, for the whole server, and documented."""

import json
import re
import time
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from octavo.engine.config import EngineConfig
from octavo.engine.messages import ITERATION_TOKENS, Ready, Stats
from octavo.server.figures import Figures, Histogram
from octavo.server.metrics import Metrics
from octavo.server.siblings import Siblings
from tests.server.conftest import PATIENCE, start

ROOT = Path(__file__).parent.parent.parent
FAMILY = re.compile(r"^# TYPE (\S+) (\S+)$", re.MULTILINE)
COUNT = "vllm:e2e_request_latency_seconds_count"


def exposed(snapshots=None, stats=None, ready=None):
    snapshots = snapshots or [Figures().snapshot("api0", 0)]
    return Metrics(
        "tiny",
        stats=lambda: stats or Stats(),
        ready=lambda: ready,
        snapshots=lambda: snapshots,
        config=EngineConfig(),
    )


def names():
    """Every name as a dashboard writes it: histograms without their suffixes."""
    return set(FAMILY.findall(exposed().text().decode()))


@pytest.fixture(scope="module")
def measured(model):
    running = start(model, step=0.01)
    yield running
    running.process.terminate()
    running.process.wait(PATIENCE)


def test_every_name_is_in_the_documentation_with_its_kind_and_no_other():
    text = (ROOT / "docs/metrics.md").read_text()
    rows = set(re.findall(r"^\| `([\w:]+)[^`]*` \| (\w+) \|", text, re.MULTILINE))
    assert rows == names()


def test_the_dashboard_asks_for_names_that_there_are():
    dashboard = json.loads((ROOT / "deploy/grafana.json").read_text())
    asked = [t["expr"] for panel in dashboard["panels"] for t in panel.get("targets", ())]
    known = {name for name, _ in names()}
    histograms = {name for name, kind in names() if kind == "histogram"}
    suffixed = {f"{name}_{part}" for name in histograms for part in ("bucket", "sum", "count")}
    used = {name for expr in asked for name in re.findall(r"(?:vllm|octavo):\w+", expr)}
    assert used <= (known - histograms) | suffixed
    assert len(used) > 20


def test_a_request_is_counted_in_every_histogram_of_requests(measured):
    before = {name: measured.metric(f"{name}_count") for name, kind in names() if kind != "gauge"}
    body = {"prompt": "abcd", "max_tokens": 6, "n": 2}
    assert measured.post("/v1/completions", body).status_code == 200
    for name in (
        "e2e_request_latency_seconds request_queue_time_seconds request_inference_time_seconds "
        "request_prefill_time_seconds request_decode_time_seconds request_prompt_tokens "
        "request_time_per_output_token_seconds request_generation_tokens request_params_n "
        "request_max_num_generation_tokens request_params_max_tokens "
        "request_prefill_kv_computed_tokens"
    ).split():
        name = f"vllm:{name}"
        assert measured.metric(f"{name}_count") == before[name] + 1, name
    between = measured.metric("vllm:inter_token_latency_seconds_count")
    assert between == before["vllm:inter_token_latency_seconds"] + 10


def test_the_sums_are_what_the_request_was(model, launch):
    server = launch(step=0.02)
    server.post("/v1/completions", {"prompt": "abcd", "max_tokens": 6, "n": 2})
    sums = {
        "request_prompt_tokens": 4,
        "request_generation_tokens": 12,
        "request_max_num_generation_tokens": 6,
        "request_params_n": 2,
        "request_params_max_tokens": 6,
    }
    for name, expected in sums.items():
        assert server.metric(f"vllm:{name}_sum") == expected, name
    decode = server.metric("vllm:request_decode_time_seconds_sum")
    assert 0.08 < decode < 2
    each = server.metric("vllm:request_time_per_output_token_seconds_sum")
    assert each == pytest.approx(decode / 5)
    whole = server.metric("vllm:e2e_request_latency_seconds_sum")
    assert whole > server.metric("vllm:request_inference_time_seconds_sum") > decode


def test_http_requests_are_counted_by_route_and_never_by_a_strangers_address(measured):
    measured.get("/v1/models/tiny")
    measured.get("/v1/models/nothing")
    for i in range(3):
        measured.get(f"/made/up/{i}")
    httpx.request("BREW", measured.url + "/version")
    text = measured.get("/metrics").text
    assert 'method="GET",model_name="tiny",route="/v1/models/{name:path}",status="200"} 1.0' in text
    assert 'method="GET",model_name="tiny",route="/v1/models/{name:path}",status="404"} 1.0' in text
    assert 'route="none",status="404"} 3.0' in text
    assert 'http_requests_total{handler="none",method="GET",status="4xx"} 3.0' in text
    assert "/made/up" not in text and "BREW" not in text


def test_any_process_answers_for_all_of_them(launch):
    server = launch("--api-server-count", "3", step=0.001)
    for _ in range(24):
        assert server.post("/v1/completions", {"prompt": "ab", "max_tokens": 3}).is_success

    def counts():  # a process knows of the others what they wrote, twice a second
        return {server.metric(COUNT) for _ in range(12)}

    server.until(lambda: counts() == {24}, f"{counts()} of 24 counted")
    answers = {httpx.get(f"{server.url}/metrics").text.count("api") for _ in range(6)}
    assert answers == {6}, "memory and open requests of three processes"
    assert counts() == {24}
    assert server.metric("vllm:request_success_total") == 24


def test_a_process_that_takes_anothers_place_goes_on_from_its_figures(tmp_path):
    first = Figures()
    first.finished[("stop",)] = 5
    first.first_token.observe(0.3, 5)
    before = Siblings(first, str(tmp_path), 1, 2, lambda: 0)
    before._write()
    second = Figures()
    Siblings(second, str(tmp_path), 1, 2, lambda: 0)
    assert second.finished[("stop",)] == 5
    assert sum(second.first_token.counts) == 5
    assert second.first_token.sum == pytest.approx(1.5)
    other = Siblings(Figures(), str(tmp_path), 0, 2, lambda: 3)
    own, sibling = other.everybody()
    assert (own.open_requests, sibling.process) == (3, "api1")
    (tmp_path / "figures-1").write_bytes(b"half a fi")
    assert len(other.everybody()) == 1, "a file that cannot be read is left out"


def test_load_is_what_is_under_way(launch):
    server = launch(step=0.2)
    assert server.get("/load").json() == {"server_load": 0}
    body = {"prompt": "ab", "max_tokens": 50, "stream": True}
    with httpx.stream("POST", server.url + "/v1/completions", json=body, timeout=PATIENCE) as one:
        pieces = one.iter_raw()
        next(pieces)
        assert server.get("/load").json() == {"server_load": 1}
    server.until(lambda: server.get("/load").json() == {"server_load": 0}, "it is still counted")


def test_the_engines_figures_come_through():
    stats = Stats(
        running=2,
        waiting=5,
        deferred=3,
        slots=8,
        pages=[100],
        pages_free=[60],
        pages_cached=[10],
        prompt_tokens=70,
        prefix_hits=30,
        evictions=4,
        iterations=[1] * (len(ITERATION_TOKENS) + 1),
        iteration_tokens=99,
        resident_bytes=5000,
    )
    ready = Ready("m", 512, 99, [2], 8, 256, [], 1.5, page_size=16, kv_dtype="float32")
    text = exposed(stats=stats, ready=ready).text().decode()
    for line in (
        'num_requests_waiting_by_reason{engine="0",model_name="tiny",reason="capacity"} 2.0',
        'vllm:kv_cache_usage_perc{engine="0",model_name="tiny"} 0.3',
        'vllm:prompt_tokens_total{engine="0",model_name="tiny"} 100.0',
        'by_source_total{engine="0",model_name="tiny",source="local_cache_hit"} 30.0',
        'octavo:evictions_total{engine="0",model_name="tiny"} 4.0',
        'octavo:pages{engine="0",model_name="tiny",state="cached"} 10.0',
        'vllm:iteration_tokens_total_sum{engine="0",model_name="tiny"} 99.0',
        'octavo:startup_seconds{engine="0",model_name="tiny"} 1.5',
        'memory_bytes{engine="0",model_name="tiny",process="engine"} 5000.0',
    ):
        assert line in text, line
    assert 'block_size="16",cache_dtype="float32"' in text


def test_a_bucket_holds_what_is_not_above_its_bound():
    histogram = Histogram((1, 2, 4))
    for value in (0.5, 1, 1.5, 4, 9):
        histogram.observe(value)
    assert (histogram.counts, histogram.sum) == ([2, 1, 1, 1], 16)


def samples(text):
    """Every sample: its name, its labels and its value."""
    families = text_string_to_metric_families(text.decode())
    return {s.name: (s.labels, s.value) for family in families for s in family.samples}


def test_a_router_finds_what_the_inference_extension_asks_for_by_its_default_names():
    ready = Ready("tiny", 512, 100, [2], 8, 512, [], 0.1, page_size=16)
    stats = Stats(running=3, waiting=5, pages=[60, 40], pages_free=[30, 20], pages_cached=[10, 15])
    before = time.time()
    told = samples(exposed(stats=stats, ready=ready).text())
    assert told["vllm:num_requests_waiting"][1] == 5
    assert told["vllm:num_requests_running"][1] == 3
    assert told["vllm:kv_cache_usage_perc"][1] == 0.25, "cached pages can be had at once"
    labels, value = told["vllm:cache_config_info"]
    assert (labels["block_size"], labels["num_gpu_blocks"], value) == ("16", "100", 1)
    labels, value = told["vllm:lora_requests_info"]
    assert labels["max_lora"] == "0"
    assert labels["running_lora_adapters"] == labels["waiting_lora_adapters"] == ""
    assert before <= value <= time.time(), "the router takes the newest"
