"""From the engine's batched messages to each request's output.

One message carries a step's tokens of all sequences. For each live sequence: append, detokenize,
look for stop strings and repetition; then, per request, build an output if its kind and interval
ask for one. It runs beside whoever waits for the text, never in the engine's loop.
"""

import time
from collections.abc import Sequence

import numpy as np

from octavo.engine.messages import Finish, Logprobs, Output, Start
from octavo.engine.sampling_params import (
    RepetitionDetectionParams,
    RequestOutputKind,
    SamplingParams,
)
from octavo.engine.text.detokenizer import Detokenizer
from octavo.engine.text.outputs import (
    CompletionOutput,
    Logprob,
    PositionLogprobs,
    RequestMetrics,
    RequestOutput,
)
from octavo.engine.text.tokenizer import Tokenizer


class _Request:
    """One request and its sequences."""

    __slots__ = (
        *("id", "prompt", "prompt_ids", "params", "kind", "interval", "sequences", "open"),
        *("metrics", "cached", "prompt_logprobs", "prompt_told", "error", "status"),
    )

    def __init__(
        self, request_id: str, prompt: str | None, prompt_ids: list[int], params: SamplingParams
    ) -> None:
        self.id = request_id
        self.prompt = prompt
        self.prompt_ids = prompt_ids
        self.params = params
        self.kind = params.output_kind
        self.interval = params.stream_interval or 1
        self.sequences: list[_Sequence] = []
        self.open = params.n  # sequences that go on
        self.metrics = RequestMetrics()
        self.cached: int | None = None
        wanted = params.prompt_logprobs is not None or bool(params.prompt_logprob_token_ids)
        self.prompt_logprobs: list[PositionLogprobs | None] | None = (
            [None] * len(prompt_ids) if wanted else None
        )
        self.prompt_told = False
        self.error = ""
        self.status = 200


class _Sequence:
    """One of a request's `n` sequences."""

    __slots__ = (
        *("request", "index", "handle", "ids", "fresh", "text", "emitted", "detokenizer"),
        *("logprobs", "cumulative", "finish_reason", "stop_reason", "lazy"),
    )

    def __init__(
        self, request: _Request, index: int, handle: int, detokenizer: Detokenizer | None
    ) -> None:
        params = request.params
        self.request = request
        self.index = index
        self.handle = handle
        self.ids: list[int] = []
        self.fresh: list[int] = []  # tokens of the message that is being processed
        self.emitted = 0  # tokens told so far
        self.detokenizer = detokenizer
        # Nobody reads the text before the end and nothing is looked for in it: decode it then.
        self.lazy = request.kind is RequestOutputKind.FINAL_ONLY and not params.stop_strings
        self.logprobs: list[PositionLogprobs] | None = (
            [] if params.logprobs is not None or params.logprob_token_ids else None
        )
        self.cumulative = 0.0
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None

    def advance(self, finish: Finish | None) -> bool:
        """Take in the fresh tokens. True if the engine must be told to stop this sequence."""
        params, fresh = self.request.params, self.fresh
        self.fresh = []
        told = finish is not None  # the engine knows already that this one ends
        stop_string = None
        if self.detokenizer is None or self.lazy:
            self.ids += fresh
        else:
            hidden = finish is not None and finish.reason == "stop" and not _shows_stop(params)
            stop_string = self._read(fresh, hidden)
        if finish is not None:
            self.finish_reason, self.stop_reason = finish.reason, None
            if finish.reason == "stop" and finish.stop_token >= 0:
                self.stop_reason = finish.stop_token
        if stop_string is None and params.repetition_detection is not None and not told:
            if repeats(self.ids, params.repetition_detection):
                self.finish_reason = "repetition"
        if self.finish_reason is not None and stop_string is None:
            stop_string = self._close(finish)
        if stop_string is not None:
            self.finish_reason, self.stop_reason = "stop", stop_string
        return self.finish_reason is not None and not told

    def _read(self, fresh: list[int], hide_last: bool) -> str | None:
        """Detokenize; tokens past the one that completes a stop string never were."""
        assert self.detokenizer is not None
        shown = fresh[:-1] if hide_last else fresh
        if not self.request.params.stop:
            self.ids += fresh
            self.detokenizer.push(shown)
            return None
        for token in shown:
            self.ids.append(token)
            look = len(self.ids) > self.request.params.min_tokens
            if (found := self.detokenizer.push((token,), look)) is not None:
                return found
        self.ids += fresh[len(shown) :]
        return None

    def _close(self, finish: Finish | None) -> str | None:
        if self.detokenizer is None:
            return None
        if self.lazy:
            hide = finish is not None and finish.reason == "stop"
            hide = hide and not _shows_stop(self.request.params)
            self.detokenizer.push(self.ids[:-1] if hide else self.ids)
        return self.detokenizer.end(len(self.ids) > self.request.params.min_tokens)

    def output(self) -> CompletionOutput:
        """What the request's output kind tells of this sequence now."""
        delta = self.request.kind is RequestOutputKind.DELTA
        first = self.emitted if delta else 0
        self.emitted = len(self.ids)
        text = ""
        if self.detokenizer is not None:
            text = self.detokenizer.take() if delta else self.detokenizer.text
        logprobs = self.logprobs
        if logprobs is not None:
            logprobs = logprobs[first : len(self.ids)]
        return CompletionOutput(
            self.index,
            text,
            self.ids[first:],
            self.cumulative if logprobs is not None else None,
            logprobs,
            self.finish_reason,
            self.stop_reason,
        )


class OutputProcessor:
    """All live requests of one client. Not thread-safe: one owner feeds and reads it."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._requests: dict[str, _Request] = {}
        self._live: dict[int, _Sequence] = {}

    def __len__(self) -> int:
        return len(self._requests)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._requests

    def add(
        self,
        request_id: str,
        handle: int,
        n: int,
        prompt: str | None,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        arrival: float | None = None,
    ) -> None:
        """Expect a request's tokens under the handles handle ... handle + n - 1."""
        assert request_id not in self._requests, f"{request_id=} is alive"
        request = _Request(request_id, prompt, list(prompt_token_ids), params)
        request.open = n
        request.metrics.arrival_time = time.monotonic() if arrival is None else arrival
        for index in range(n):
            detokenizer = None
            if params.detokenize and self._tokenizer is not None:
                detokenizer = Detokenizer(
                    self._tokenizer,
                    skip_special_tokens=params.skip_special_tokens,
                    stop=params.stop_strings,
                    include_stop=params.include_stop_str_in_output,
                    prompt=request.prompt_ids,
                )
            sequence = _Sequence(request, index, handle + index, detokenizer)
            request.sequences.append(sequence)
            self._live[handle + index] = sequence
        self._requests[request_id] = request

    def abort(self, request_id: str) -> list[int]:
        """Forget a request nobody waits for. Returns the handles that the engine must abort."""
        request = self._requests.pop(request_id, None)
        if request is None:
            return []
        handles = [s.handle for s in request.sequences if s.handle in self._live]
        for handle in handles:
            del self._live[handle]
        return handles

    def fail_all(self, message: str, status: int = 500) -> list[RequestOutput]:
        """The engine is gone: every request ends with this error."""
        outputs = []
        for request in list(self._requests.values()):
            request.error, request.status = message, status
            for sequence in request.sequences:
                sequence.finish_reason = sequence.finish_reason or "error"
            request.open = 0
            outputs.append(self._output(request, request.sequences))
        self._requests.clear()
        self._live.clear()
        return outputs

    def process(
        self, message: Output, now: float | None = None
    ) -> tuple[list[RequestOutput], list[int]]:
        """Outputs that are due, and the handles that ended here and not in the engine."""
        now = time.monotonic() if now is None else now
        live = self._live
        for start in message.starts:
            self._start(start, now)
        for entry in message.logprobs:
            self._logprobs(entry)
        touched: dict[int, _Sequence] = {}
        handles = np.frombuffer(message.handles, "<u4").tolist()
        tokens = np.frombuffer(message.tokens, "<i4").tolist()
        for handle, token in zip(handles, tokens, strict=True):
            sequence = live.get(handle)
            if sequence is not None:
                sequence.fresh.append(token)
                touched[handle] = sequence
        finishes = {}
        for finish in message.finished:
            sequence = live.get(finish.handle)
            if sequence is not None:
                finishes[finish.handle] = finish
                touched[finish.handle] = sequence
        aborts: list[int] = []
        due: dict[str, list[_Sequence]] = {}
        for handle, sequence in touched.items():
            self._advance(sequence, finishes.get(handle), now, aborts)
            request = sequence.request
            if sequence.finish_reason is not None or (
                request.kind is not RequestOutputKind.FINAL_ONLY
                and (
                    sequence.emitted == 0
                    or len(sequence.ids) - sequence.emitted >= request.interval
                )
            ):
                due.setdefault(request.id, []).append(sequence)
        outputs = [
            self._output(self._requests[request_id], sequences)
            for request_id, sequences in due.items()
            if self._requests[request_id].kind is not RequestOutputKind.FINAL_ONLY
            or self._requests[request_id].open == 0
        ]
        for output in outputs:
            if output.finished:
                del self._requests[output.request_id]
        return outputs, aborts

    def _advance(
        self, sequence: _Sequence, finish: Finish | None, now: float, aborts: list[int]
    ) -> None:
        request = sequence.request
        metrics = request.metrics
        if sequence.fresh:
            metrics.last_token_time = now
            if not metrics.first_token_time:
                metrics.first_token_time = now
        before = len(sequence.ids)
        if sequence.advance(finish):
            aborts.append(sequence.handle)
        metrics.generation_tokens += len(sequence.ids) - before
        if sequence.finish_reason is None:
            return
        del self._live[sequence.handle]
        request.open -= 1
        if finish is not None and finish.reason == "error":
            request.error, request.status = finish.message, finish.status
        if not request.open:
            metrics.finished_time = now

    def _output(self, request: _Request, changed: list[_Sequence]) -> RequestOutput:
        delta = request.kind is RequestOutputKind.DELTA
        prompt_logprobs = request.prompt_logprobs
        if delta and request.prompt_told:
            prompt_logprobs = None
        request.prompt_told = True
        return RequestOutput(
            request.id,
            request.prompt,
            request.prompt_ids,
            prompt_logprobs,
            [sequence.output() for sequence in (changed if delta else request.sequences)],
            request.open == 0,
            request.metrics,
            request.cached,
            request.error,
            request.status,
        )

    def _start(self, start: Start, now: float) -> None:
        sequence = self._live.get(start.handle)
        if sequence is None:
            return
        request = sequence.request
        if request.cached is None or sequence.index == 0:
            request.cached = start.cached_tokens
            request.metrics.scheduled_time = request.metrics.arrival_time + start.queued

    def _logprobs(self, entry: Logprobs) -> None:
        sequence = self._live.get(entry.handle)
        if sequence is None:
            return
        request = sequence.request
        tokens = np.frombuffer(entry.tokens, "<i4").tolist()
        values = np.frombuffer(entry.logprobs, "<f4").tolist()
        position: PositionLogprobs = {}
        ranked = len(tokens) - entry.named
        for i, (token, value) in enumerate(zip(tokens, values, strict=True)):
            if token not in position:  # the token itself comes first and may be among the likeliest
                text = self._tokenizer.token_text(token) if self._tokenizer is not None else None
                rank = entry.rank if i == 0 else i if i < ranked else None
                position[token] = Logprob(value, rank, text)
        if entry.position < len(request.prompt_ids):
            if request.prompt_logprobs is not None:
                request.prompt_logprobs[entry.position] = position
        elif sequence.logprobs is not None:
            sequence.logprobs.append(position)
            sequence.cumulative += values[0]


def repeats(ids: list[int], rule: RepetitionDetectionParams) -> bool:
    """The last tokens are one pattern, `min_count` times over."""
    for size in range(rule.min_pattern_size, rule.max_pattern_size + 1):
        span = size * rule.min_count
        if span > len(ids):
            return False
        # Equal to itself shifted by the pattern's size: periodic. The last token says no cheaply.
        if ids[-1] == ids[-1 - size] and ids[-span + size :] == ids[-span:-size]:
            return True
    return False


def _shows_stop(params: SamplingParams) -> bool:
    return params.include_stop_str_in_output


__all__ = ["OutputProcessor", "repeats"]
