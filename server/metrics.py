"""What /metrics says: the names of vLLM, so that its dashboards work, and a few of our own.

Totals and gauges of the engine come from its last Stats; what only the front end sees (latencies,
finish reasons) is counted in Figures. Nothing is computed until somebody asks.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric

from octavo.engine.config import EngineConfig
from octavo.engine.messages import ITERATION_TOKENS, Ready, Stats
from octavo.server.figures import HISTOGRAMS, Figures, Snapshot

LABELS = ("model_name", "engine")
FINISH_REASONS = ("stop", "length", "abort", "error", "repetition")
REFUSALS = ("queue_full", "engine_unavailable")
Row = tuple[str, str, float]


class Metrics:
    """The exposition of one server, whichever of its processes is asked."""

    def __init__(
        self,
        model_name: str,
        *,
        stats: Callable[[], Stats],
        ready: Callable[[], Ready | None],
        snapshots: Callable[[], list[Snapshot]],
        config: EngineConfig,
    ) -> None:
        self._labels = (model_name, "0")
        self._stats, self._ready, self._snapshots = stats, ready, snapshots
        self._config = config
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def text(self) -> bytes:
        """The exposition format, version 0.0.4."""
        return generate_latest(self._registry)

    def load(self) -> int:
        """Generations under way in the whole server."""
        return sum(snapshot.open_requests for snapshot in self._snapshots())

    def collect(self) -> Iterator[Metric]:
        """Called by prometheus_client for every scrape."""
        stats, snapshots = self._stats(), self._snapshots()
        figures = Figures()
        for snapshot in snapshots:
            figures.add(snapshot)
        yield from self._engine_gauges(stats)
        yield from self._engine_totals(stats)
        yield from self._frontend_totals(figures)
        yield from self._processes(stats, snapshots)
        yield self._cache_info(stats)
        yield self._adapters_info()
        yield self._histogram(
            "vllm:iteration_tokens_total",
            "Tokens of a step: prompt and generated",
            (*ITERATION_TOKENS,),
            stats.iterations or [0] * (len(ITERATION_TOKENS) + 1),
            stats.iteration_tokens,
        )
        for name, histogram in figures.histograms.items():
            help, bounds = HISTOGRAMS[name]
            yield self._histogram(name, help, bounds, histogram.counts, histogram.sum)

    def _histogram(
        self, name: str, help: str, bounds: tuple[float, ...], counts: list[int], total: float
    ) -> Metric:
        family = HistogramMetricFamily(name, help, labels=LABELS)
        names = (*map(str, bounds), "+Inf")
        family.add_metric(
            self._labels, list(zip(names, accumulate(counts), strict=True)), float(total)
        )
        return family

    def _gauge(self, name: str, help: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, help, labels=LABELS)
        family.add_metric(self._labels, value)
        return family

    def _labelled(
        self,
        kind: type[GaugeMetricFamily] | type[CounterMetricFamily],
        name: str,
        help: str,
        labels: tuple[str, ...],
        rows: Iterable[tuple[tuple[str, ...], float]],
    ) -> Metric:
        family = kind(name, help, labels=(*LABELS, *labels))
        for values, number in rows:
            family.add_metric((*self._labels, *values), number)
        return family

    def _engine_gauges(self, stats: Stats) -> Iterator[Metric]:
        total = sum(stats.pages)
        free, cached = sum(stats.pages_free), sum(stats.pages_cached)
        used = total - free - cached
        ready = self._ready()
        for row in (
            ("vllm:num_requests_running", "Sequences in a slot", stats.running),
            ("vllm:num_requests_waiting", "Sequences that wait for a slot", stats.waiting),
            ("vllm:kv_cache_usage_perc", "Share of pages in use", used / total if total else 0.0),
            ("octavo:steps_in_flight", "Steps dispatched and not yet read", stats.in_flight),
            ("octavo:slots", "Sequences that can be decoded together", stats.slots),
            (
                "octavo:startup_seconds",
                "From the engine's start to its readiness",
                ready.startup_seconds if ready else 0.0,
            ),
        ):
            yield self._gauge(*row)
        yield self._labelled(
            GaugeMetricFamily,
            "vllm:num_requests_waiting_by_reason",
            "Sequences that wait: for a slot (capacity) or for their request's first choice",
            ("reason",),
            [(("capacity",), stats.waiting - stats.deferred), (("deferred",), stats.deferred)],
        )
        yield self._labelled(
            GaugeMetricFamily,
            "octavo:pages",
            "Pages of the cache by state",
            ("state",),
            [(("used",), used), (("free",), free), (("cached",), cached)],
        )

    def _engine_totals(self, stats: Stats) -> Iterator[Metric]:
        for name, help, value in (
            (
                "vllm:prompt_tokens",
                "Prompt tokens taken in, computed or found",
                stats.prompt_tokens + stats.prefix_hits,
            ),
            (
                "vllm:prompt_tokens_cached",
                "Prompt tokens found in the prefix cache",
                stats.prefix_hits,
            ),
            ("vllm:generation_tokens", "Tokens generated", stats.generation_tokens),
            ("vllm:num_preemptions", "Sequences put back into the queue", stats.preemptions),
            ("vllm:prefix_cache_queries", "Tokens looked up", stats.prefix_queries),
            ("vllm:prefix_cache_hits", "Tokens found", stats.prefix_hits),
            ("octavo:steps", "Steps dispatched", stats.steps),
            ("octavo:stalled_reads", "Reads that blocked the device", stats.stalls),
            (
                "octavo:compiles_after_ready",
                "Programs compiled while serving: should be 0",
                stats.compiles_after_ready,
            ),
            (
                "octavo:host_seconds",
                "Host time spent in turns; over octavo:steps_total it is the time per step",
                stats.host_seconds,
            ),
            ("octavo:evictions", "Pages that the prefix cache gave up", stats.evictions),
            ("octavo:page_waits", "Turns in which no page was surely free", stats.page_waits),
            ("octavo:host_orders", "Messages that the leader sent to each host", stats.orders),
            ("octavo:host_order_bytes", "Bytes of these messages", stats.order_bytes),
            ("octavo:restarts", "Times the state was rebuilt after a step raised", stats.restarts),
        ):
            counter = CounterMetricFamily(name, help, labels=LABELS)
            counter.add_metric(self._labels, value)
            yield counter
        yield self._labelled(
            CounterMetricFamily,
            "vllm:prompt_tokens_by_source",
            "Prompt tokens by where they came from",
            ("source",),
            [
                (("local_compute",), stats.prompt_tokens),
                (("local_cache_hit",), stats.prefix_hits),
            ],
        )

    def _frontend_totals(self, figures: Figures) -> Iterator[Metric]:
        finished = {(reason,): 0 for reason in FINISH_REASONS} | figures.finished
        yield self._labelled(
            CounterMetricFamily,
            "vllm:request_success",
            "Sequences that ended, by how",
            ("finished_reason",),
            sorted(finished.items()),
        )
        refused = {(reason,): 0 for reason in REFUSALS} | figures.refused
        yield self._labelled(
            CounterMetricFamily,
            "vllm:admission_rejections",
            "Requests refused on arrival",
            ("reason",),
            sorted(refused.items()),
        )
        yield self._labelled(
            CounterMetricFamily,
            "octavo:http_requests",
            "HTTP requests answered",
            ("route", "method", "status"),
            sorted(figures.http.items()),
        )
        yield self._grouped_http(figures)

    def _grouped_http(self, figures: Figures) -> Metric:
        """The same under the name and labels that FastAPI's instrumentation gives it."""
        grouped: dict[tuple[str, str, str], int] = {}
        for (route, method, status), count in figures.http.items():
            key = (route, method, f"{status[0]}xx")
            grouped[key] = grouped.get(key, 0) + count
        family = CounterMetricFamily(
            "http_requests", "HTTP requests answered", labels=("handler", "method", "status")
        )
        for labels, count in sorted(grouped.items()):
            family.add_metric(labels, count)
        return family

    def _processes(self, stats: Stats, snapshots: list[Snapshot]) -> Iterator[Metric]:
        memory = [((s.process,), float(s.resident_bytes)) for s in snapshots]
        memory.append((("engine",), float(stats.resident_bytes)))
        yield self._labelled(
            GaugeMetricFamily,
            "octavo:process_resident_memory_bytes",
            "Memory of each process that is in RAM",
            ("process",),
            memory,
        )
        yield self._labelled(
            GaugeMetricFamily,
            "octavo:open_requests",
            "Generations under way, by the API process that answers them",
            ("process",),
            [((s.process,), float(s.open_requests)) for s in snapshots],
        )

    def _cache_info(self, stats: Stats) -> Metric:
        ready, config = self._ready(), self._config
        facts = {
            "block_size": ready.page_size if ready else 0,
            "num_gpu_blocks": sum(stats.pages),
            "cache_dtype": ready.kv_dtype if ready else "",
            "enable_prefix_caching": config.enable_prefix_caching,
            "max_model_len": ready.max_model_len if ready else 0,
            "max_num_seqs": ready.max_num_seqs if ready else 0,
            "max_num_batched_tokens": ready.max_num_batched_tokens if ready else 0,
            "steps_in_flight": config.steps_in_flight,
        }
        return self._labelled(
            GaugeMetricFamily,
            "vllm:cache_config_info",
            "How the cache is laid out, in its labels",
            tuple(facts),
            [(tuple(map(str, facts.values())), 1.0)],
        )

    def _adapters_info(self) -> Metric:
        """Routers read it, and take the newest by its value; no adapters are served here."""
        return self._labelled(
            GaugeMetricFamily,
            "vllm:lora_requests_info",
            "LoRA adapters in its labels: most, running, waiting; its value is the time",
            ("max_lora", "running_lora_adapters", "waiting_lora_adapters"),
            [(("0", "", ""), time.time())],
        )
