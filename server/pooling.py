"""Embeddings, scores and ranks: what the routes of reading models ask of the engine."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from octavo.engine.messages import Pooler, Ready
from octavo.engine.sampling_params import ParameterError
from octavo.engine.text.opened import ModelText
from octavo.engine.text.reading import (
    Text,
    Texts,
    check_dimensions,
    cosine,
    embedding,
    pairs,
    pooler_for,
    score,
)
from octavo.server.client import EngineClient
from octavo.server.protocol.errors import bad_request
from octavo.server.protocol.pooling import EmbeddingRequest, ReadingRequest

LONG_TEXT = 8192  # characters of all texts; beyond, a thread tokenizes
T = TypeVar("T")


@dataclass(frozen=True)
class Embedded:
    """A body's embeddings."""

    vectors: list[np.ndarray]  # f32[E], or cut to `dimensions`
    tokens: int


@dataclass(frozen=True)
class Scored:
    """A body's scores, in the order of its pairs."""

    scores: list[float]
    tokens: int


class Pooling:
    """Tokenizes and asks the engine; one a process."""

    def __init__(self, text: ModelText, client: EngineClient) -> None:
        self._text, self._client = text, client

    async def embed(self, body: EmbeddingRequest, request_id: str) -> Embedded:
        """ApiError 400 names what cannot be served, 503 says to wait."""
        ready, pooler = await self._ready("embed")
        prompts = body.prompts()
        if body.dimensions is not None:
            _checked(lambda: check_dimensions(pooler, body.dimensions or 0))
        special = body.add_special_tokens is not False
        texts = Texts(self._text, ready, body.truncate_prompt_tokens)
        size = sum(len(prompt) for prompt in prompts)
        read = await _away(size, lambda: [texts.one(prompt, special) for prompt in prompts])
        vectors = await self._client.encodings.read(read, request_id)
        shown = [embedding(v, pooler, body.dimensions, body.normalize) for v in vectors]
        return Embedded(shown, _tokens(read))

    async def score(
        self,
        first: Sequence[str],
        second: Sequence[str],
        body: ReadingRequest,
        request_id: str,
        field: str = "text_2",
    ) -> Scored:
        """How well each pair goes together: by a cross-encoder, or the cosine of embeddings."""
        ready, pooler = await self._ready("embed", "score")
        matched = _checked(lambda: pairs(first, second))
        texts = Texts(self._text, ready, body.truncate_prompt_tokens, field)
        size = sum(len(a) + len(b) for a, b in matched)
        if pooler.task == "score":
            if pooler.size != 1:
                raise bad_request(
                    f"the model has {pooler.size} labels, and a score needs a model with exactly 1"
                )
            read = await _away(size, lambda: [texts.pair(a, b) for a, b in matched])
            vectors = await self._client.encodings.read(read, request_id)
            return Scored([score(v, pooler) for v in vectors], _tokens(read))
        read = await _away(size, lambda: [texts.one(t) for t in (*first, *second)])
        vectors = await self._client.encodings.read(read, request_id)
        left, right = vectors[: len(first)], vectors[len(first) :]
        left = left * len(right) if len(left) == 1 else left
        scores = [cosine(a, b) for a, b in zip(left, right, strict=True)]
        return Scored(scores, _tokens(read))

    async def _ready(self, *tasks: str) -> tuple[Ready, Pooler]:
        await self._client.until_ready()
        ready = self._client.ready
        assert ready is not None, "until_ready lets nobody past before the engine is ready"
        try:
            return ready, pooler_for(ready, *tasks)
        except ValueError as error:
            raise bad_request(str(error)) from None


def _tokens(texts: Sequence[Text]) -> int:
    return sum(len(text.ids) for text in texts)


def _checked(work: Callable[[], T]) -> T:
    try:
        return work()
    except ParameterError as error:
        raise bad_request(str(error), error.parameter) from None


async def _away(size: int, work: Callable[[], T]) -> T:
    """Small work at once, large work in a thread. ApiError 400 for a parameter that is wrong."""
    if size <= LONG_TEXT:
        return _checked(work)
    return await asyncio.to_thread(_checked, work)
