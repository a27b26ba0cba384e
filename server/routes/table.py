"""Every route with what it takes and gives: the app serves it, /openapi.json describes it."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from octavo.server.protocol.chat import ChatCompletionRequest, ChatCompletionResponse
from octavo.server.protocol.completions import CompletionRequest, CompletionResponse
from octavo.server.protocol.models import (
    DetokenizeRequest,
    DetokenizeResponse,
    ModelCard,
    ModelList,
    TokenizeRequest,
    TokenizeResponse,
)
from octavo.server.routes import chat, completions, health, models, tokenize


@dataclass(frozen=True)
class Endpoint:
    """One path and method."""

    path: str
    handler: Callable[[Request], Awaitable[Response]]
    summary: str
    body: Any = None  # the msgspec type of the request's body
    answer: Any = None  # of the response's body; None: not JSON
    method: str = "GET"
    streams: bool = False  # `stream: true` answers with server-sent events

    def route(self) -> Route:
        return Route(self.path, self.handler, methods=[self.method])


def post(
    path: str, handler: Any, summary: str, body: Any, answer: Any, streams: bool = False
) -> Endpoint:
    return Endpoint(path, handler, summary, body, answer, "POST", streams)


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
    Endpoint("/health", health.health, "Whether the server and its engine live"),
    Endpoint("/ping", health.health, "The same as /health"),
    Endpoint("/ping", health.health, "The same as /health", method="POST"),
    Endpoint("/ready", health.ready, "Whether the engine can generate"),
    Endpoint("/version", health.version, "The version of Octavo"),
    Endpoint("/metrics", health.metrics, "Figures for Prometheus"),
]
