"""What a process counts: histograms and labelled totals, and how those of several become one."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable

import msgspec

from octavo.engine.resident import resident_bytes

Labels = tuple[str, ...]  # the values of a total's labels, in the order in which they are declared

SECONDS_TO_FIRST = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0,
                    7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0)  # fmt: skip
SECONDS_BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4,
                   0.5, 0.75, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0)  # fmt: skip
SECONDS_OF_REQUEST = (0.01, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0,
                      40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0)  # fmt: skip
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
CHOICES = (1, 2, 5, 10, 20)


class Histogram:
    """Counts per bucket; observing is one bisection, cheap enough for every token."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times

    def add(self, counts: Iterable[int], total: float) -> None:
        """Add what another process counted in the same buckets."""
        self.counts = [a + b for a, b in zip(self.counts, counts, strict=True)]
        self.sum += total


# name: (what it measures, its buckets). Observed in the front end, once a request unless it says.
HISTOGRAMS: dict[str, tuple[str, tuple[float, ...]]] = {
    "vllm:time_to_first_token_seconds": ("From arrival to the first token", SECONDS_TO_FIRST),
    "vllm:inter_token_latency_seconds": (
        "Between two tokens of a sequence; of tokens that came together, each its share",
        SECONDS_BETWEEN,
    ),
    "vllm:request_time_per_output_token_seconds": (
        "A request's mean time between tokens",
        SECONDS_BETWEEN,
    ),
    "vllm:e2e_request_latency_seconds": ("From arrival to the end", SECONDS_OF_REQUEST),
    "vllm:request_queue_time_seconds": ("From arrival to a slot", SECONDS_OF_REQUEST),
    "vllm:request_inference_time_seconds": ("From the slot to the end", SECONDS_OF_REQUEST),
    "vllm:request_prefill_time_seconds": ("From the slot to the first token", SECONDS_OF_REQUEST),
    "vllm:request_decode_time_seconds": ("From the first token to the last", SECONDS_OF_REQUEST),
    "vllm:request_prompt_tokens": ("Prompt tokens of a request", TOKENS),
    "vllm:request_generation_tokens": ("Generated tokens of a request", TOKENS),
    "vllm:request_max_num_generation_tokens": ("Tokens of the longest choice", TOKENS),
    "vllm:request_params_n": ("Choices that a request asked for", CHOICES),
    "vllm:request_params_max_tokens": ("The `max_tokens` of a request", TOKENS),
    "vllm:request_prefill_kv_computed_tokens": (
        "Prompt tokens that were not found in the prefix cache",
        TOKENS,
    ),
}


class Snapshot(msgspec.Struct, array_like=True):
    """All that one API process counted; sums of them are the server's."""

    histograms: dict[str, tuple[list[int], float]]
    totals: dict[str, list[tuple[list[str], int]]]
    process: str = ""
    open_requests: int = 0
    resident_bytes: int = 0


class Figures:
    """Totals since start. One a process; only its event loop writes."""

    def __init__(self) -> None:
        self.histograms = {name: Histogram(b) for name, (_, b) in HISTOGRAMS.items()}
        self.first_token = self.histograms["vllm:time_to_first_token_seconds"]
        self.between_tokens = self.histograms["vllm:inter_token_latency_seconds"]
        self.queued = self.histograms["vllm:request_queue_time_seconds"]
        self.finished: Counter[Labels] = Counter()  # (reason,)
        self.refused: Counter[Labels] = Counter()  # (reason,)
        self.http: Counter[Labels] = Counter()  # (route, method, status)

    def count_cut(self, status: int) -> None:
        """A connection was refused with this status before a request was whole."""
        self.http["none", "OTHER", str(status)] += 1

    def snapshot(self, process: str, open_requests: int) -> Snapshot:
        return Snapshot(
            {name: (h.counts, h.sum) for name, h in self.histograms.items()},
            {
                name: [(list(labels), n) for labels, n in counter.items()]
                for name, counter in self._totals().items()
            },
            process,
            open_requests,
            resident_bytes(),
        )

    def add(self, snapshot: Snapshot) -> None:
        for name, (counts, total) in snapshot.histograms.items():
            self.histograms[name].add(counts, total)
        own = self._totals()
        for name, entries in snapshot.totals.items():
            for labels, n in entries:
                own[name][tuple(labels)] += n

    def _totals(self) -> dict[str, Counter[Labels]]:
        return {"finished": self.finished, "refused": self.refused, "http": self.http}
