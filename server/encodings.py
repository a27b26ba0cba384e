"""Texts on their way to a vector: what generations are, for models that only read."""

import asyncio
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from octavo.engine.messages import Abort, Output
from octavo.engine.text.reading import Text
from octavo.server.protocol.errors import ApiError, bad_request, unavailable

if TYPE_CHECKING:
    from octavo.server.client import EngineClient

RETRY_AFTER = 1  # seconds


class _Body:
    """The texts of one request body."""

    def __init__(self, first: int, count: int) -> None:
        self.first = first
        self.vectors: list[bytes | None] = [None] * count
        self.left = count
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()


class Encodings:
    """All bodies that wait, by the handles of their texts."""

    def __init__(self, client: "EngineClient", max_queued: int) -> None:
        self._client, self._max_queued = client, max_queued
        self._waiting: dict[int, _Body] = {}

    def __len__(self) -> int:
        return len({id(body) for body in self._waiting.values()})

    async def read(self, texts: Sequence[Text], request_id: str) -> list[bytes]:
        """Each text's vector, in order. Whoever stops waiting takes the work along."""
        self._check_room(len(texts))
        arrival = time.monotonic()
        handles = self._client.reserve(len(texts))
        body = _Body(handles.start, len(texts))
        try:
            for handle, text in zip(handles, texts, strict=True):
                self._waiting[handle] = body
                self._read(len(text.ids))
                self._client.send(text.request(handle, request_id, arrival))
            await body.done
        finally:
            left = [handle for handle in handles if self._waiting.pop(handle, None)]
            self._client.release(handles)
            if left and self._client.last_words is None:
                self._ended("abort", len(left))
                self._client.send(Abort(left))
        self._took(time.monotonic() - arrival)
        return [vector for vector in body.vectors if vector is not None]

    def take(self, output: Output) -> None:
        """What the engine said; handles that nobody waits for are passed over."""
        for encoded in output.encoded:
            body = self._waiting.pop(encoded.handle, None)
            if body is not None:
                body.vectors[encoded.handle - body.first] = encoded.vector
                body.left -= 1
                self._ended("stop", 1)
                if not body.left and not body.done.done():
                    body.done.set_result(None)
        if self._waiting:
            for finish in output.finished:
                body = self._waiting.get(finish.handle)
                if finish.reason == "error" and body is not None:
                    del self._waiting[finish.handle]
                    self._ended("error", 1)
                    self._fail(body, ApiError(finish.status, finish.message))

    def fail_all(self, error: ApiError) -> None:
        """End every body with an error."""
        for body in set(self._waiting.values()):
            self._fail(body, error)

    def _fail(self, body: _Body, error: ApiError) -> None:
        if not body.done.done():
            body.done.set_exception(error)

    def _check_room(self, count: int) -> None:
        if count > self._max_queued:
            raise bad_request(
                f"the body has {count:,} texts, more than the {self._max_queued:,} that may wait "
                "(--max-num-queued-reqs): send fewer at once"
            )
        if len(self._waiting) + count > self._max_queued:
            self._refused()
            raise unavailable(
                f"{len(self._waiting):,} texts wait already, and {count:,} more are above the "
                f"limit of {self._max_queued:,} (--max-num-queued-reqs): try again later",
                RETRY_AFTER,
            )

    # --- what /metrics says of it

    def _read(self, tokens: int) -> None:
        self._client.figures.histograms["vllm:request_prompt_tokens"].observe(tokens)

    def _ended(self, reason: str, count: int) -> None:
        self._client.figures.finished[(reason,)] += count

    def _refused(self) -> None:
        self._client.figures.refused[("queue_full",)] += 1

    def _took(self, seconds: float) -> None:
        self._client.figures.histograms["vllm:e2e_request_latency_seconds"].observe(seconds)
