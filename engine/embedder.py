"""Embedder: a reading engine in the caller's process; what LLM's embed, encode and score use."""

import itertools
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from octavo.engine.config import EngineConfig
from octavo.engine.encoder import EncoderCore
from octavo.engine.encoder_plan import Progress
from octavo.engine.progress import Bar
from octavo.engine.requests import Prompt, as_list
from octavo.engine.text.opened import ModelText
from octavo.engine.text.outputs import (
    EmbeddingOutput,
    EmbeddingRequestOutput,
    ScoringOutput,
    ScoringRequestOutput,
)
from octavo.engine.text.reading import Text, Texts, cosine, embedding, pairs, pooler_for, score


class Embedder:
    """Texts in, vectors out."""

    def __init__(
        self, config: EngineConfig, text: ModelText, progress: Progress | None = None
    ) -> None:
        """Load and compile. Raises ConfigError."""
        self.core = EncoderCore(config, progress=progress)
        self.ready = self.core.ready()
        self._text = text
        self._handles = itertools.count(1)

    def encode(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        normalize: bool | None = None,
        dimensions: int | None = None,
        truncate: int | None = None,
        show: bool = False,
    ) -> tuple[np.ndarray, list[Text]]:
        """f32[n, E], a row a prompt, and what was read. Raises ValueError."""
        pooler = pooler_for(self.ready, "embed")
        texts = Texts(self._text, self.ready, truncate, "prompts")
        read = [texts.one(plain(prompt)) for prompt in as_list(prompts)]
        vectors = self._vectors(read, show)
        rows = [embedding(vector, pooler, dimensions, normalize) for vector in vectors]
        return np.stack(rows) if rows else np.zeros((0, pooler.size), np.float32), read

    def embed(self, prompts: Any, **options: Any) -> list[EmbeddingRequestOutput]:
        """As `encode`, one output a prompt."""
        rows, read = self.encode(prompts, **options)
        return [
            EmbeddingRequestOutput(str(i), EmbeddingOutput(row.tolist()), list(text.ids))
            for i, (row, text) in enumerate(zip(rows, read, strict=True))
        ]

    def score(
        self,
        first: str | Sequence[str],
        second: str | Sequence[str],
        *,
        truncate: int | None = None,
        show: bool = False,
    ) -> list[ScoringRequestOutput]:
        """How well each pair goes together: a cross-encoder's score, or the embeddings' cosine."""
        pooler = pooler_for(self.ready, "embed", "score")
        left, right = ([side] if isinstance(side, str) else list(side) for side in (first, second))
        matched = pairs(left, right)
        texts = Texts(self._text, self.ready, truncate, "text_2")
        if pooler.task == "score":
            read = [texts.pair(a, b) for a, b in matched]
            found = [score(vector, pooler) for vector in self._vectors(read, show)]
            ids = [list(text.ids) for text in read]
        else:
            read = [texts.one(text) for text in (*left, *right)]
            vectors = self._vectors(read, show)
            one, other = vectors[: len(left)], vectors[len(left) :]
            one = one * len(other) if len(one) == 1 else one
            found = [cosine(a, b) for a, b in zip(one, other, strict=True)]
            ids = [list(text.ids) for text in read[len(left) :]]
        return [
            ScoringRequestOutput(str(i), ScoringOutput(number), own)
            for i, (number, own) in enumerate(zip(found, ids, strict=True))
        ]

    def _vectors(self, texts: Sequence[Text], show: bool) -> list[bytes]:
        """Run them all. Raises RuntimeError where the engine failed."""
        now = time.monotonic()
        handles = [next(self._handles) for _ in texts]
        found: dict[int, bytes] = {}
        try:
            for handle, text in zip(handles, texts, strict=True):
                self.core.add(text.request(handle, str(handle), now), bounded=False)
            sizes = dict(zip(handles, (len(text.ids) for text in texts), strict=True))
            with Bar("reading", len(texts), show=show) as bar:
                while len(found) < len(handles):
                    for output in self.core.turn():
                        for finish in output.finished:
                            if finish.reason == "error":
                                raise RuntimeError(finish.message)
                        for encoded in output.encoded:
                            found[encoded.handle] = encoded.vector
                            bar.advance(sizes[encoded.handle])
        finally:
            self.core.abort(handles)
        return [found[handle] for handle in handles]


def plain(prompt: Prompt) -> str | Sequence[int]:
    """A prompt's text or token ids, out of the dictionary that may hold it."""
    if isinstance(prompt, str | Sequence):
        return prompt
    found = prompt.get("prompt_token_ids") or prompt.get("prompt")
    if found is None:
        raise ValueError('a prompt needs "prompt" (text) or "prompt_token_ids" (a list)')
    return found
