"""One OpenTelemetry span a request, with the gen_ai attributes; nothing of it runs without a flag.

The packages are the extra `octavo[otel]`. A span is made when its request has ended, from the
Record, with the times that were noted; it continues the trace that the caller's `traceparent`
names. What OpenTelemetry reads from the environment (OTEL_SERVICE_NAME, OTEL_TRACES_SAMPLER,
OTEL_EXPORTER_OTLP_HEADERS and the rest) holds.
"""

import importlib.util
import os
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from octavo import __version__
from octavo.engine.config import ConfigError
from octavo.server.observe import PROBES, Record
from octavo.server.settings import ServerSettings

if TYPE_CHECKING:
    from octavo.server.generation import Generation

NEEDED = ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http")
OPERATIONS = {"/v1/completions": "text_completion", "/v1/embeddings": "embeddings"}
Attributes = dict[str, Any]


def check_tracing(settings: ServerSettings) -> None:
    """ConfigError when traces are asked for and cannot be sent."""
    url = settings.otlp_traces_endpoint
    if not url:
        return
    if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
        raise ConfigError(
            f"`otlp_traces_endpoint` must be an address of OTLP over HTTP, got {url}",
            "--otlp-traces-endpoint http://localhost:4318/v1/traces",
        )
    for name in NEEDED:
        try:
            found = importlib.util.find_spec(name) is not None
        except ModuleNotFoundError:
            found = False
        if not found:
            raise ConfigError(
                "--otlp-traces-endpoint needs the packages of OpenTelemetry",
                "pip install 'octavo[otel]'",
            )


class Traces:
    """Makes spans of records and sends them."""

    def __init__(self, settings: ServerSettings, model: str) -> None:
        # Here and not above: they are an extra, and cost a third of a second to import.
        from opentelemetry import propagate, trace
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        resource = {"service.version": __version__}
        if not os.environ.get("OTEL_SERVICE_NAME"):
            resource["service.name"] = "octavo"
        self._provider = TracerProvider(resource=Resource.create(resource), shutdown_on_exit=False)
        exporter = OTLPSpanExporter(endpoint=_with_path(settings.otlp_traces_endpoint))
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("octavo", __version__)
        self._extract, self._server = propagate.extract, trace.SpanKind.SERVER
        self._failed = trace.Status(trace.StatusCode.ERROR)
        self._model = model

    def tell(self, record: Record) -> None:
        """The request has ended."""
        if record.route in PROBES:
            return
        carrier = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in record.headers
        }
        operation = ""
        if record.generations:
            operation = OPERATIONS.get(record.route, "chat")
        elif record.read_tokens:
            operation = OPERATIONS.get(record.route, record.route.rpartition("/")[2])
        seconds = time.monotonic() - record.began
        span = self._tracer.start_span(
            f"{operation} {self._model}" if operation else f"{record.method} {record.route}",
            context=self._extract(carrier),
            kind=self._server,
            start_time=int(record.wall * 1e9),
            attributes=dict(_attributes(record, operation, self._model)),
        )
        if record.status >= 500:
            span.set_status(self._failed)
        span.end(int((record.wall + seconds) * 1e9))

    def close(self) -> None:
        """Send what is left; takes as long as the receiver, at most its time-out."""
        self._provider.shutdown()


def _with_path(url: str) -> str:
    return url if urlsplit(url).path not in ("", "/") else url.rstrip("/") + "/v1/traces"


def _attributes(record: Record, operation: str, model: str) -> Iterator[tuple[str, Any]]:
    yield "http.request.method", record.method
    yield "http.route", record.route
    yield "http.response.status_code", record.status
    if record.status >= 400:
        yield "error.type", str(record.status)
    if not operation:
        return
    yield "gen_ai.operation.name", operation
    yield "gen_ai.provider.name", "octavo"
    yield "gen_ai.request.model", model
    yield "gen_ai.response.model", model
    yield "gen_ai.response.id", record.id
    yield "gen_ai.request.id", record.id
    if record.generations:
        yield from _asked(record.generations[0]).items()
        yield from _given(record.generations).items()
    else:
        yield "gen_ai.usage.input_tokens", record.read_tokens


def _asked(generation: "Generation") -> Attributes:
    sampling = generation.sampling
    asked: Attributes = {
        "gen_ai.request.choice.count": sampling.n,
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
        "gen_ai.request.top_k": sampling.top_k,
        "gen_ai.request.frequency_penalty": sampling.frequency_penalty,
        "gen_ai.request.presence_penalty": sampling.presence_penalty,
    }
    if sampling.max_tokens is not None:
        asked["gen_ai.request.max_tokens"] = sampling.max_tokens
    if sampling.seed is not None:
        asked["gen_ai.request.seed"] = sampling.seed
    return asked


def _given(generations: "list[Generation]") -> Attributes:
    """Tokens and times; of several prompts the sums, and the latest times."""
    asked = sum(g.prompt_tokens for g in generations)
    made = sum(g.tokens for g in generations)
    given: Attributes = {
        "gen_ai.usage.input_tokens": asked,
        "gen_ai.usage.output_tokens": made,
        "gen_ai.usage.prompt_tokens": asked,
        "gen_ai.usage.completion_tokens": made,
        "gen_ai.usage.cache_read.input_tokens": sum(g.cached_tokens for g in generations),
        "gen_ai.usage.num_sequences": sum(len(g.handles) for g in generations),
        "gen_ai.response.finish_reasons": [r for g in generations for r in g.reasons],
        "gen_ai.latency.e2e": time.monotonic() - min(g.arrival for g in generations),
        "gen_ai.latency.time_in_queue": max(g.queued for g in generations),
    }
    begun = [g for g in generations if g.first]
    if begun:
        start = min(g.arrival + g.queued for g in begun)
        first, last = min(g.first for g in begun), max(g.last for g in begun)
        given |= {
            "gen_ai.latency.time_to_first_token": min(g.first - g.arrival for g in begun),
            "gen_ai.latency.time_in_model_prefill": first - start,
            "gen_ai.latency.time_in_model_decode": last - first,
            "gen_ai.latency.time_in_model_inference": last - start,
        }
    return given
