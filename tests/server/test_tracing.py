"""Traces reach a receiver of OTLP, with the attributes that dashboards of gen_ai know."""

import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from octavo.engine.config import ConfigError
from octavo.server.settings import ServerSettings
from octavo.server.tracing import check_tracing
from tests.server.conftest import PATIENCE

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


class FakeReceiver(ThreadingHTTPServer):
    """Takes OTLP over HTTP, as a collector does, and keeps the spans."""

    def __init__(self):
        self.spans, self.services, self.headers = [], set(), {}
        super().__init__(("127.0.0.1", 0), FakeReceiverHandler)
        threading.Thread(target=self.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1/traces"


class FakeReceiverHandler(BaseHTTPRequestHandler):
    server: FakeReceiver

    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        assert self.path == "/v1/traces"
        self.server.headers = dict(self.headers)
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            self.server.services |= {
                a.value.string_value
                for a in resource.resource.attributes
                if a.key == "service.name"
            }
            for scope in resource.scope_spans:
                self.server.spans += scope.spans
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        pass


def value(any_value):
    kind = any_value.WhichOneof("value")
    if kind == "array_value":
        return [value(item) for item in any_value.array_value.values]
    return getattr(any_value, kind)


@pytest.fixture
def receiver(monkeypatch):
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")  # ms
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-team=llm")
    running = FakeReceiver()
    yield running
    running.shutdown()
    running.server_close()


def test_a_span_tells_what_a_request_asked_and_got(receiver, launch):
    server = launch("--otlp-traces-endpoint", receiver.url.removesuffix("/v1/traces"), step=0.002)
    body = {"prompt": "abcd", "max_tokens": 7, "temperature": 0.5, "n": 2, "stream": True}
    began = time.time()
    httpx.post(
        f"{server.url}/v1/completions",
        json=body,
        headers={"traceparent": f"00-{TRACE}-{PARENT}-01", "x-request-id": "mine"},
        timeout=PATIENCE,
    )
    server.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "n": 0})
    server.until(lambda: len(receiver.spans) == 2, f"{len(receiver.spans)} spans came")
    span, refused = receiver.spans
    told = {a.key: value(a.value) for a in span.attributes}
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, PARENT)
    assert span.name == "text_completion tiny"
    assert {name: told.get(name) for name in ASKED} == ASKED
    for name in LATENCIES:
        assert 0 <= told[f"gen_ai.latency.{name}"] < 10, name
    assert told["gen_ai.latency.e2e"] >= told["gen_ai.latency.time_to_first_token"] > 0
    assert began - 1 < span.start_time_unix_nano / 1e9 < span.end_time_unix_nano / 1e9
    assert (receiver.services, receiver.headers["x-team"]) == ({"octavo"}, "llm")
    refusal = {a.key: value(a.value) for a in refused.attributes}
    assert (refused.name, refusal["error.type"]) == ("POST /v1/chat/completions", "400")
    assert "abcd" not in str(receiver.spans), "the text of a prompt was sent"


ASKED = {
    "gen_ai.operation.name": "text_completion",
    "gen_ai.request.model": "tiny",
    "gen_ai.response.id": "cmpl-mine",
    "gen_ai.request.max_tokens": 7,
    "gen_ai.request.temperature": 0.5,
    "gen_ai.request.choice.count": 2,
    "gen_ai.usage.input_tokens": 4,
    "gen_ai.usage.output_tokens": 14,
    "gen_ai.response.finish_reasons": ["length", "length"],
    "http.route": "/v1/completions",
    "http.response.status_code": 200,
}
LATENCIES = (
    "e2e time_in_queue time_to_first_token time_in_model_prefill time_in_model_decode "
    "time_in_model_inference"
).split()


def test_spans_that_are_not_sent_yet_are_sent_at_the_end(receiver, launch, monkeypatch):
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "60000")
    server = launch("--otlp-traces-endpoint", receiver.url)
    server.post("/v1/completions", {"prompt": "ab", "max_tokens": 1})
    server.process.terminate()
    assert server.process.wait(PATIENCE) == 0
    assert [span.name for span in receiver.spans] == ["text_completion tiny"]


def test_without_the_packages_the_flag_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'octavo\[otel\]'"):
        check_tracing(ServerSettings(otlp_traces_endpoint="http://localhost:4318"))
    check_tracing(ServerSettings())


def test_an_endpoint_that_is_none_is_refused():
    with pytest.raises(ConfigError, match="OTLP over HTTP"):
        check_tracing(ServerSettings(otlp_traces_endpoint="localhost:4317"))


def test_nothing_of_opentelemetry_is_imported_without_the_flag(server):
    maps = open(f"/proc/{server.process.pid}/maps").read()
    assert "_upb" not in maps and "opentelemetry" not in maps
