"""What /metrics says: the names of vLLM, so that its dashboards work, and a few of our own.

Totals and gauges come from the engine's last Stats; what only the front end sees (latencies, finish
reasons) is counted here. Nothing is computed until somebody asks.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric

from octavo.engine.messages import Stats

LABELS = ("model_name", "engine")
FINISH_REASONS = ("stop", "length", "abort", "error")
SECONDS_TO_FIRST = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0,
                    7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0)  # fmt: skip
SECONDS_BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4,
                   0.5, 0.75, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0)  # fmt: skip
SECONDS_OF_REQUEST = (0.01, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0,
                      40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0)  # fmt: skip
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)


class Histogram:
    """Counts per bucket; observing is one bisection, cheap enough for every token."""

    def __init__(self, name: str, help: str, bounds: tuple[float, ...]) -> None:
        self.name, self.help, self._bounds = name, help, bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def family(self, labels: tuple[str, ...]) -> Metric:
        total, buckets = 0, []
        for bound, count in zip((*map(str, self._bounds), "+Inf"), self._counts, strict=True):
            total += count
            buckets.append((bound, total))
        family = HistogramMetricFamily(self.name, self.help, labels=LABELS)
        family.add_metric(labels, buckets, self._sum)
        return family


class Metrics:
    """Counts what the front end sees and shows it beside the engine's own numbers."""

    def __init__(self, model_name: str, stats: Callable[[], Stats]) -> None:
        self._labels = (model_name, "0")
        self._stats = stats
        self.finished: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.first_token = Histogram(
            "vllm:time_to_first_token_seconds", "From arrival to the first token", SECONDS_TO_FIRST
        )
        self.between_tokens = Histogram(
            "vllm:inter_token_latency_seconds", "Between two tokens of a sequence", SECONDS_BETWEEN
        )
        self.whole = Histogram(
            "vllm:e2e_request_latency_seconds", "From arrival to the end", SECONDS_OF_REQUEST
        )
        self.queued = Histogram(
            "vllm:request_queue_time_seconds", "From arrival to a slot", SECONDS_OF_REQUEST
        )
        self.prompt_tokens = Histogram(
            "vllm:request_prompt_tokens", "Prompt tokens of a request", TOKENS
        )
        self.generation_tokens = Histogram(
            "vllm:request_generation_tokens", "Generated tokens of a request", TOKENS
        )
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def text(self) -> bytes:
        """The exposition format, version 0.0.4."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """Called by prometheus_client for every scrape."""
        stats = self._stats()
        yield from self._gauges(stats)
        yield from self._totals(stats)
        success = CounterMetricFamily(
            "vllm:request_success", "Requests that ended", labels=(*LABELS, "finished_reason")
        )
        for reason in sorted({*FINISH_REASONS, *self.finished}):
            success.add_metric((*self._labels, reason), self.finished[reason])
        yield success
        refusals = CounterMetricFamily(
            "vllm:admission_rejections", "Requests refused on arrival", labels=(*LABELS, "reason")
        )
        for reason in sorted({"queue_full", *self.refused}):
            refusals.add_metric((*self._labels, reason), self.refused[reason])
        yield refusals
        for value in vars(self).values():
            if isinstance(value, Histogram):
                yield value.family(self._labels)

    def _gauges(self, stats: Stats) -> Iterator[Metric]:
        total = sum(stats.pages)
        used = total - sum(stats.pages_free) - sum(stats.pages_cached)
        for name, help, value in (
            ("vllm:num_requests_running", "Sequences in a slot", stats.running),
            ("vllm:num_requests_waiting", "Sequences that wait for a slot", stats.waiting),
            ("vllm:kv_cache_usage_perc", "Share of pages in use", used / total if total else 0.0),
            ("octavo:steps_in_flight", "Steps dispatched and not yet read", stats.in_flight),
            ("octavo:slots", "Sequences that can be decoded together", stats.slots),
        ):
            gauge = GaugeMetricFamily(name, help, labels=LABELS)
            gauge.add_metric(self._labels, value)
            yield gauge
        pages = GaugeMetricFamily("octavo:pages", "Pages by state", labels=(*LABELS, "state"))
        free, cached = sum(stats.pages_free), sum(stats.pages_cached)
        for state, count in (("used", used), ("free", free), ("cached", cached)):
            pages.add_metric((*self._labels, state), count)
        yield pages

    def _totals(self, stats: Stats) -> Iterator[Metric]:
        for name, help, value in (
            ("vllm:prompt_tokens", "Prompt tokens taken in", stats.prompt_tokens),
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
            ("octavo:host_seconds", "Host time spent in turns", stats.host_seconds),
            ("octavo:restarts", "Times the state was rebuilt", stats.restarts),
        ):
            counter = CounterMetricFamily(name, help, labels=LABELS)
            counter.add_metric(self._labels, value)
            yield counter
