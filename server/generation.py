"""Generation: the outputs of one request on their way from the engine to whoever reads them."""

import asyncio
from collections.abc import AsyncIterator, Callable

from octavo.engine.messages import AddRequest
from octavo.engine.text.outputs import RequestMetrics, RequestOutput
from octavo.server.figures import Figures
from octavo.server.protocol.errors import ApiError


class Generation:
    """The outputs of one request, as they come. Iterate it once, and `cancel` it when done."""

    __slots__ = (
        *("request_id", "handles", "arrival", "sampling", "prompt_tokens", "cached_tokens"),
        *("tokens", "first", "queued", "reasons", "timeout", "_abort", "_figures", "_left"),
        *("_pending", "_error", "_wake", "_last", "_lengths"),
    )

    def __init__(
        self, request: AddRequest, figures: Figures, abort: Callable[["Generation"], None]
    ) -> None:
        self.request_id = request.request_id
        self.sampling = request.sampling
        self.handles = range(request.handle, request.handle + request.sampling.n)
        self.arrival, self.timeout = request.arrival, request.timeout
        self.prompt_tokens = len(request.prompt) // 4
        self.cached_tokens = self.tokens = 0
        self.first = 0.0  # when the first token came; 0 is not yet
        self.queued = 0.0  # seconds without a slot
        self.reasons: list[str] = []  # why choices ended
        self._abort, self._figures = abort, figures
        self._left = len(self.handles)  # sequences that have not ended
        self._pending: list[RequestOutput] = []
        self._error: ApiError | None = None
        self._wake: asyncio.Future[None] | None = None
        self._last: dict[int, float] = {}  # when each choice got its last token
        self._lengths: dict[int, int] = {}  # tokens of each choice, where there are several

    async def __aiter__(self) -> AsyncIterator[list[RequestOutput]]:
        """What has come since the last look: one item when the reader keeps up, more when not."""
        while True:
            if self._pending:
                batch, self._pending = self._pending, []
                yield batch
            elif self._error is not None:
                raise self._error
            elif self._left == 0:
                return
            else:
                self._wake = asyncio.get_running_loop().create_future()
                await self._wake

    def cancel(self) -> None:
        """Nobody wants the rest; does nothing once all has ended."""
        if self._left and self._error is None:
            self._abort(self)

    def put(self, output: RequestOutput, now: float) -> None:
        """One more output; called by the client's reader."""
        figures = self._figures
        if output.error:
            figures.finished[("error",)] += self._left
            if output.status == 503:
                figures.refused[("queue_full",)] += 1
            self.fail(ApiError(output.status, output.error))
            return
        for choice in output.outputs:
            count, index = len(choice.token_ids), choice.index
            if count:
                last = self._last.get(index)
                if last is None:
                    self.first = self.first or now
                    figures.first_token.observe(now - self.arrival)
                else:
                    figures.between_tokens.observe((now - last) / count, count)
                self._last[index] = now
                self.tokens += count
                if len(self.handles) > 1:
                    self._lengths[index] = self._lengths.get(index, 0) + count
            if choice.finish_reason is not None:
                self._left -= 1
                self.reasons.append(choice.finish_reason)
                figures.finished[(choice.finish_reason,)] += 1
        if output.finished:
            self.cached_tokens = output.num_cached_tokens or 0
            if output.metrics is not None:
                self._measure(output.metrics, now)
        self._pending.append(output)
        self._notify()

    def _measure(self, times: RequestMetrics, now: float) -> None:
        """Count the request as a whole."""
        histograms = self._figures.histograms

        def observe(name: str, value: float) -> None:
            histograms[name].observe(max(0.0, value))

        observe("vllm:e2e_request_latency_seconds", now - self.arrival)
        observe("vllm:request_prompt_tokens", self.prompt_tokens)
        observe("vllm:request_prefill_kv_computed_tokens", self.prompt_tokens - self.cached_tokens)
        observe("vllm:request_generation_tokens", self.tokens)
        longest = max(self._lengths.values(), default=self.tokens)
        observe("vllm:request_max_num_generation_tokens", longest)
        observe("vllm:request_params_n", len(self.handles))
        if self.sampling.max_tokens is not None:
            observe("vllm:request_params_max_tokens", self.sampling.max_tokens)
        if not times.scheduled_time or not times.first_token_time:
            return
        first, last = times.first_token_time, times.last_token_time
        observe("vllm:request_inference_time_seconds", last - times.scheduled_time)
        observe("vllm:request_prefill_time_seconds", first - times.scheduled_time)
        observe("vllm:request_decode_time_seconds", last - first)
        if longest > 1:
            observe("vllm:request_time_per_output_token_seconds", (last - first) / (longest - 1))

    def fail(self, error: ApiError) -> None:
        """End with an error, after what is already here."""
        if self._error is None:
            self._error = error
            self.reasons.append("error")
        self._notify()

    def _notify(self) -> None:
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)
