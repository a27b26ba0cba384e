"""Texts for a model that reads, and what its vectors mean. No jax: it runs beside whoever asks."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from octavo.engine.messages import EncodeRequest, Pooler, Ready
from octavo.engine.sampling_params import ParameterError
from octavo.engine.text.opened import ModelText
from octavo.engine.text.tokenizer import Tokenizer

TRUNCATE = "truncate_prompt_tokens"


@dataclass(frozen=True)
class Text:
    """What the model reads for one vector."""

    ids: Sequence[int]
    second: int = 0  # where the second text of a pair begins; 0: there is one text

    def request(self, handle: int, request_id: str, arrival: float) -> EncodeRequest:
        """The engine's message."""
        prompt = np.asarray(self.ids, "<i4").tobytes()
        return EncodeRequest(handle, request_id, prompt, self.second, arrival)


@dataclass(frozen=True)
class Texts:
    """Reads texts within the limits of one engine. Raises ParameterError, with the field's name."""

    text: ModelText
    ready: Ready
    truncate: int | None = None  # tokens of a text that count; -1: as many as the model takes
    field: str = "input"  # what the caller named the texts

    def limit(self) -> int | None:
        """The most tokens that a text may have after cutting; None: nothing is cut."""
        longest = self.ready.max_model_len
        if self.truncate is None:
            return None
        if self.truncate == -1:
            return longest
        if not 1 <= self.truncate <= longest:
            raise ParameterError(
                TRUNCATE, f"must be from 1 to {longest:,}, or -1, got {self.truncate}"
            )
        return self.truncate

    def one(self, prompt: str | Sequence[int], special: bool = True) -> Text:
        """One text, or the token ids of one."""
        limit = self.limit()
        if not isinstance(prompt, str):
            size = self.ready.vocab_size
            for token in prompt:
                if isinstance(token, bool) or not 0 <= token < size:
                    raise ParameterError(
                        self.field, f"has the token {token}; ids are from 0 to {size - 1}"
                    )
            return self._checked(Text(list(prompt[:limit])))
        tokenizer = self._tokenizer()
        ids = tokenizer.encode(prompt, add_special_tokens=special)
        if limit is not None and len(ids) > limit:
            return self._within(prompt, None, limit) if special else Text(ids[:limit])
        return self._checked(Text(ids))

    def pair(self, first: str, second: str) -> Text:
        """Two texts that the model reads as one."""
        return self._checked(self._within(first, second, self.limit()))

    def _within(self, first: str, second: str | None, limit: int | None) -> Text:
        try:
            return Text(*self._tokenizer().encode_within(first, second, limit))
        except ValueError as error:
            raise ParameterError(TRUNCATE, str(error)) from None

    def _tokenizer(self) -> Tokenizer:
        if self.text.tokenizer is None:
            raise ParameterError(
                self.field, f"must be token ids, not text: {self.text.no_template}"
            )
        return self.text.tokenizer

    def _checked(self, text: Text) -> Text:
        longest = self.ready.max_model_len
        if not text.ids:
            raise ParameterError(self.field, "has a text without tokens: give at least one")
        if len(text.ids) > longest:
            raise ParameterError(
                self.field,
                f"has a text of {len(text.ids):,} tokens, and this model reads {longest:,}; "
                f"`{TRUNCATE}` -1 cuts longer ones",
            )
        return text


def pooler_for(ready: Ready, *tasks: str) -> Pooler:
    """What the engine gives for a text. Raises ValueError where it does none of `tasks`."""
    pooler = ready.pooler
    if pooler is None:
        raise ValueError(
            f"the model `{ready.model}` generates text here and gives no embeddings or scores: "
            "start it with --runner pooling, or serve an embedding model"
        )
    if pooler.task not in tasks:
        gives, wanted = ("embeddings", "scores") if pooler.task == "embed" else _SCORES
        raise ValueError(f"the model `{ready.model}` gives {gives} here, and no {wanted}")
    return pooler


_SCORES = ("scores for pairs of texts", "embeddings")


def embedding(
    vector: bytes, pooler: Pooler, dimensions: int | None = None, normalize: bool | None = None
) -> np.ndarray:
    """f32[E], or its first `dimensions` numbers; scaled to length 1 where the model means that."""
    found = np.frombuffer(vector, "<f4")
    if dimensions is not None:
        found = found[: check_dimensions(pooler, dimensions)]
    if pooler.normalize if normalize is None else normalize:
        found = unit(found)
    return found


def check_dimensions(pooler: Pooler, dimensions: int) -> int:
    """The length to cut embeddings to. Raises ParameterError for one that cannot be."""
    if not 1 <= dimensions <= pooler.size:
        raise ParameterError("dimensions", f"must be from 1 to {pooler.size}, got {dimensions}")
    if pooler.dimensions and dimensions not in pooler.dimensions:
        known = ", ".join(map(str, pooler.dimensions))
        raise ParameterError("dimensions", f"must be one of {known}, got {dimensions}")
    return dimensions


def unit(vector: np.ndarray) -> np.ndarray:
    """The vector scaled to length 1."""
    return vector / np.float32(max(float(np.linalg.norm(vector)), 1e-12))


def cosine(a: bytes, b: bytes) -> float:
    """Of two vectors of the engine."""
    return float(unit(np.frombuffer(a, "<f4")) @ unit(np.frombuffer(b, "<f4")))


def score(vector: bytes, pooler: Pooler) -> float:
    """What a classifier with one label says of a pair. Raises ValueError where it has more."""
    found = np.frombuffer(vector, "<f4")
    if len(found) != 1:
        raise ValueError(
            f"the model has {len(found)} labels, and a score needs a model with exactly 1"
        )
    number = float(found[0])
    if pooler.activation == "identity":
        return number
    return float(1 / (1 + np.exp(-number)))


def pairs(first: Sequence[str], second: Sequence[str]) -> list[tuple[str, str]]:
    """One with each of many, or each with its own. Raises ParameterError."""
    if not first or not second:
        raise ParameterError("text_1" if not first else "text_2", "must not be empty")
    if len(first) == 1:
        first = [first[0]] * len(second)
    if len(first) != len(second):
        raise ParameterError(
            "text_2",
            f"has {len(second)} texts for {len(first)} in `text_1`: give one with many, or as many",
        )
    return list(zip(first, second, strict=True))
