"""Every route with what it takes and gives: the app serves it, /openapi.json describes it."""

from typing import Any

from octavo.server.endpoint import Endpoint, post
from octavo.server.protocol.chat import ChatCompletionRequest, ChatCompletionResponse
from octavo.server.protocol.completions import CompletionRequest, CompletionResponse
from octavo.server.protocol.models import (
    DetokenizeRequest,
    DetokenizeResponse,
    Load,
    ModelCard,
    ModelList,
    Status,
    TokenizeRequest,
    TokenizeResponse,
    Version,
)
from octavo.server.protocol.pooling import (
    EmbeddingRequest,
    EmbeddingResponse,
    RerankRequest,
    RerankResponse,
    ScoreRequest,
    ScoreResponse,
)
from octavo.server.routes import chat, completions, docs, health, models, pooling, tokenize

ENDPOINTS = [
    post(
        "/v1/chat/completions",
        chat.create,
        "Answer a conversation",
        ChatCompletionRequest,
        ChatCompletionResponse,
        streams=True,
    ),
    post(
        "/v1/completions",
        completions.create,
        "Continue one or several prompts",
        CompletionRequest,
        CompletionResponse,
        streams=True,
    ),
    post(
        "/v1/embeddings",
        pooling.embeddings,
        "A vector for each text",
        EmbeddingRequest,
        EmbeddingResponse,
    ),
    *(
        post(path, pooling.score, "How well pairs go together", ScoreRequest, ScoreResponse)
        for path in ("/v1/score", "/score")
    ),
    *(
        post(path, pooling.rerank, "Documents by relevance", RerankRequest, RerankResponse)
        for path in ("/v1/rerank", "/rerank", "/v2/rerank")
    ),
    Endpoint("/v1/models", models.listing, "The models served here", answer=ModelList),
    Endpoint("/v1/models/{name:path}", models.one, "One model", answer=ModelCard),
    post(
        "/tokenize",
        tokenize.tokenize,
        "The tokens of a prompt or conversation",
        TokenizeRequest,
        TokenizeResponse,
    ),
    post(
        "/detokenize",
        tokenize.detokenize,
        "The text of tokens",
        DetokenizeRequest,
        DetokenizeResponse,
    ),
    Endpoint("/health", health.health, "Whether the server and its engine live", answer=Status),
    Endpoint("/ping", health.health, "The same as /health", answer=Status),
    Endpoint("/ping", health.health, "The same as /health", answer=Status, method="POST"),
    Endpoint("/ready", health.ready, "Whether the engine can generate", answer=Status),
    Endpoint("/version", health.version, "The version of Octavo", answer=Version),
    Endpoint("/load", health.load, "Generations under way", answer=Load),
    Endpoint("/metrics", health.metrics, "Figures for Prometheus", media_type="text/plain"),
    Endpoint("/openapi.json", docs.openapi, "This description", answer=dict[str, Any]),
    Endpoint("/docs", docs.page, "This description for people", media_type="text/html"),
]
