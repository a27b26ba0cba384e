"""/v1/embeddings, /v1/score and /v1/rerank: bodies in and out."""

import base64
from typing import Literal

import msgspec
import numpy as np

from octavo.server.protocol.errors import bad_request
from octavo.server.protocol.sampling import Usage


class ReadingRequest(msgspec.Struct, kw_only=True):
    """What every request to a model that reads may say."""

    model: str | None = None
    user: str | None = None
    request_id: str | None = None
    truncate_prompt_tokens: int | None = None


class EmbeddingRequest(ReadingRequest, kw_only=True):
    input: str | list[str | int | list[int]]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    add_special_tokens: bool | None = None
    normalize: bool | None = None

    def prompts(self) -> list[str | list[int]]:
        """One for each embedding, as text or as token ids."""
        given = self.input
        if isinstance(given, str):
            return [given]
        if not given:
            raise bad_request("`input` must not be empty", "input")
        ids = [item for item in given if isinstance(item, int)]
        if len(ids) == len(given):
            return [ids]
        prompts = [item for item in given if isinstance(item, str | list)]
        if ids:
            raise bad_request("`input` mixes token ids with whole texts", "input")
        return prompts


class Embedding(msgspec.Struct, kw_only=True):
    index: int
    object: str = "embedding"
    embedding: list[float] | str  # base64 of little-endian float32, where that was asked for

    @classmethod
    def of(cls, index: int, vector: np.ndarray, encoding: str) -> "Embedding":
        """One vector as the client wants it."""
        if encoding == "float":
            return cls(index=index, embedding=vector.tolist())
        raw = np.ascontiguousarray(vector, "<f4").tobytes()
        return cls(index=index, embedding=base64.b64encode(raw).decode())


class EmbeddingResponse(msgspec.Struct, kw_only=True):
    id: str
    object: str = "list"
    created: int
    model: str
    data: list[Embedding]
    usage: Usage


class ScoreRequest(ReadingRequest, kw_only=True):
    """`queries` and `documents` are other names of `text_1` and `text_2`."""

    text_1: str | list[str] | None = None
    text_2: str | list[str] | None = None
    queries: str | list[str] | None = None
    documents: str | list[str] | None = None

    def sides(self) -> tuple[list[str], list[str]]:
        """The first texts and the second ones."""
        sides = []
        for name, other in (("text_1", "queries"), ("text_2", "documents")):
            given = getattr(self, name)
            given = getattr(self, other) if given is None else given
            if given is None:
                raise bad_request(f"`{name}` is required", name)
            if not given and isinstance(given, list):
                raise bad_request(f"`{name}` must not be empty", name)
            sides.append([given] if isinstance(given, str) else given)
        return sides[0], sides[1]


class Score(msgspec.Struct, kw_only=True):
    index: int
    object: str = "score"
    score: float


class ScoreResponse(msgspec.Struct, kw_only=True):
    id: str
    object: str = "list"
    created: int
    model: str
    data: list[Score]
    usage: Usage


class Document(msgspec.Struct, kw_only=True):
    text: str


class RerankRequest(ReadingRequest, kw_only=True):
    query: str
    documents: list[str | Document]
    top_n: int | None = None  # None and 0: all
    return_documents: bool = True

    def texts(self) -> list[str]:
        """The documents, in the order of the body."""
        if not self.documents:
            raise bad_request("`documents` must not be empty", "documents")
        if self.top_n is not None and self.top_n < 0:
            raise bad_request(f"`top_n` must be at least 0, got {self.top_n}", "top_n")
        return [d if isinstance(d, str) else d.text for d in self.documents]


class Ranked(msgspec.Struct, kw_only=True, omit_defaults=True):
    index: int  # in the body's documents
    relevance_score: float
    document: Document | None = None


class RerankUsage(msgspec.Struct):
    prompt_tokens: int
    total_tokens: int


class RerankResponse(msgspec.Struct, kw_only=True):
    id: str
    model: str
    usage: RerankUsage
    results: list[Ranked]  # the best first


def ranked(body: RerankRequest, scores: list[float]) -> list[Ranked]:
    """The best `top_n` documents, the best first; equal ones in the order of the body."""
    texts = body.texts()
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    return [
        Ranked(
            index=i,
            relevance_score=scores[i],
            document=Document(text=texts[i]) if body.return_documents else None,
        )
        for i in order[: body.top_n or None]
    ]
