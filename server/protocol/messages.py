"""/v1/messages and /v1/messages/count_tokens, as Anthropic has them: bodies in and out."""

from typing import Any

import msgspec

from octavo.server.protocol.errors import ApiError, bad_request
from octavo.server.protocol.sampling import MAX_STOP_STRINGS, GenerationRequest

ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    422: "invalid_request_error",
    429: "rate_limit_error",
    499: "invalid_request_error",
    501: "invalid_request_error",
    503: "overloaded_error",
    529: "overloaded_error",
}
OVERLOADED = 529  # what Anthropic's clients know for 503


class MessagesRequest(GenerationRequest, kw_only=True):
    """Fields of sampling that Anthropic does not have are taken too."""

    messages: list[dict[str, Any]]
    max_tokens: int
    system: str | list[dict[str, Any]] | None = None
    stop_sequences: list[str] | None = None
    metadata: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None
    output_config: dict[str, Any] | None = None
    service_tier: str | None = None
    container: Any = None
    mcp_servers: list[Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def check(self) -> None:
        """Refuse, by name, what cannot be served; the rest is checked as a chat body."""
        if self.max_tokens < 1:
            raise bad_request(f"`max_tokens` must be at least 1, got {self.max_tokens}")
        if len(self.stop_sequences or ()) > MAX_STOP_STRINGS:
            raise bad_request(
                f"`stop_sequences` takes at most {MAX_STOP_STRINGS} strings, "
                f"got {len(self.stop_sequences or ())}"
            )
        if (self.n or 1) != 1:
            raise bad_request(f"`n` must be 1 here, got {self.n}; ask several times")
        for field in ("container", "mcp_servers"):
            if getattr(self, field):
                raise bad_request(f"`{field}` is not supported by this server; leave it out")


class CountTokensRequest(MessagesRequest, kw_only=True):
    """The same as a request for a message; how it would be sampled plays no part."""

    max_tokens: int = 1


class TokensCount(msgspec.Struct):
    input_tokens: int


class MessagesUsage(msgspec.Struct):
    """`input_tokens` are those that were not found in the cache."""

    input_tokens: int
    output_tokens: int
    cache_read_input_tokens: int = 0
    cache_creation_input_tokens: int = 0
    output_tokens_details: dict[str, int] | None = None


class Message(msgspec.Struct, kw_only=True):
    id: str
    type: str = "message"
    role: str = "assistant"
    model: str
    content: list[dict[str, Any]]
    stop_reason: str | None = None
    stop_sequence: str | None = None
    usage: MessagesUsage


class MessagesError(msgspec.Struct):
    type: str
    message: str


class MessagesErrorResponse(msgspec.Struct, kw_only=True):
    type: str = "error"
    error: MessagesError
    request_id: str | None = None


def status_of(error: ApiError) -> int:
    return OVERLOADED if error.status == 503 else error.status


def error_body(error: ApiError, request_id: str | None) -> MessagesErrorResponse:
    kind = ERROR_TYPES.get(error.status, "api_error")
    return MessagesErrorResponse(error=MessagesError(kind, error.message), request_id=request_id)
