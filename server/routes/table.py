"""Every route with what it takes and gives: the app serves it, /openapi.json describes it."""

from typing import Any

from octavo.server.endpoint import Endpoint, post
from octavo.server.protocol.chat import ChatCompletionRequest, ChatCompletionResponse
from octavo.server.protocol.completions import CompletionRequest, CompletionResponse
from octavo.server.protocol.messages import (
    CountTokensRequest,
    Message,
    MessagesErrorResponse,
    MessagesRequest,
    TokensCount,
)
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
from octavo.server.protocol.responses import (
    Deleted,
    ItemList,
    ResponseObject,
    ResponsesRequest,
)
from octavo.server.routes import (
    chat,
    completions,
    docs,
    health,
    messages,
    models,
    pooling,
    responses,
    tokenize,
)

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
        "/v1/responses",
        responses.create,
        "Answer a conversation in items",
        ResponsesRequest,
        ResponseObject,
        streams=True,
    ),
    Endpoint(
        "/v1/responses/{response_id}",
        responses.retrieve,
        "A response that was kept; `?stream=true&starting_after=N` is its events",
        answer=ResponseObject,
        streams=True,
    ),
    Endpoint(
        "/v1/responses/{response_id}",
        responses.delete,
        "Forget a response",
        answer=Deleted,
        method="DELETE",
    ),
    Endpoint(
        "/v1/responses/{response_id}/cancel",
        responses.cancel,
        "End the work on a response in the background",
        answer=ResponseObject,
        method="POST",
    ),
    Endpoint(
        "/v1/responses/{response_id}/input_items",
        responses.input_items,
        "The items that a response answers",
        answer=ItemList,
    ),
    post(
        "/v1/messages",
        messages.create,
        "Answer a conversation, as Anthropic has it",
        MessagesRequest,
        Message,
        streams=True,
        error=MessagesErrorResponse,
    ),
    post(
        "/v1/messages/count_tokens",
        messages.count_tokens,
        "The length of a conversation's prompt, as Anthropic has it",
        CountTokensRequest,
        TokensCount,
        error=MessagesErrorResponse,
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
