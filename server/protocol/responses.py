"""/v1/responses: bodies in and out."""

from typing import Any, Literal

import msgspec

from octavo.server.protocol.errors import bad_request, not_yet
from octavo.server.protocol.sampling import GenerationRequest

LOGPROBS = "message.output_text.logprobs"
INCLUDES = (
    LOGPROBS,
    "reasoning.encrypted_content",  # what is thought comes in plain text
    "code_interpreter_call.outputs",  # of tools that are refused: there is nothing to include
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "message.input_image.image_url",
    "web_search_call.action.sources",
    "web_search_call.results",
)
MAX_METADATA = 16


class Reasoning(msgspec.Struct):
    effort: str | None = None
    summary: str | None = None


class TextConfig(msgspec.Struct):
    """The form of the text."""

    format: dict[str, Any] | None = None
    verbosity: str | None = None


class ResponsesRequest(GenerationRequest, kw_only=True):
    """Fields of sampling that OpenAI does not have here are taken too."""

    input: str | list[dict[str, Any]]
    instructions: str | None = None
    previous_response_id: str | None = None
    conversation: Any = None
    prompt: Any = None
    context_management: Any = None
    moderation: Any = None
    max_output_tokens: int | None = None
    max_tool_calls: int | None = None
    top_logprobs: int | None = None
    include: list[str] | None = None
    text: TextConfig | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None
    truncation: Literal["auto", "disabled"] | None = None
    metadata: dict[str, str] | None = None
    background: bool | None = None
    store: bool | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def check(self) -> None:
        """Refuse, by name, what cannot be served; the rest is checked as a chat body."""
        if self.conversation:
            raise not_yet("conversation", "send `previous_response_id`, or all items in `input`")
        if self.prompt:
            raise not_yet("prompt", "send the text itself in `instructions` and `input`")
        for field in ("context_management", "moderation"):
            if getattr(self, field):
                raise not_yet(field, "leave it out")
        if self.max_tokens is not None:
            raise bad_request("`max_tokens` is called `max_output_tokens` here", "max_tokens")
        if (self.n or 1) != 1:
            raise bad_request(f"`n` must be 1 here, got {self.n}; ask several times", "n")
        for name in self.include or ():
            if name not in INCLUDES:
                raise bad_request(f"`include` knows no {name!r}", "include")
        if len(self.metadata or ()) > MAX_METADATA:
            raise bad_request(
                f"`metadata` takes at most {MAX_METADATA} pairs, got {len(self.metadata or ())}",
                "metadata",
            )
        if self.background and self.store is False:
            raise bad_request("`background` needs `store`: else nobody could ask for it", "store")

    @property
    def wants_logprobs(self) -> bool:
        return LOGPROBS in (self.include or ()) or bool(self.top_logprobs)


class ResponsesUsage(msgspec.Struct):
    input_tokens: int
    input_tokens_details: dict[str, int]
    output_tokens: int
    output_tokens_details: dict[str, int]
    total_tokens: int


class ResponseObject(msgspec.Struct, kw_only=True):
    """A response, at any time of its life. Items are as openai's clients know them."""

    id: str
    object: str = "response"
    created_at: int
    completed_at: int | None = None
    status: str
    background: bool = False
    error: dict[str, Any] | None = None
    incomplete_details: dict[str, Any] | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    max_tool_calls: int | None = None
    metadata: dict[str, str]
    model: str
    output: list[dict[str, Any]]
    parallel_tool_calls: bool = True
    previous_response_id: str | None = None
    prompt_cache_key: str | None = None
    reasoning: Reasoning
    safety_identifier: str | None = None
    service_tier: str = "default"
    store: bool = True
    temperature: float | None = 1.0
    text: TextConfig
    tool_choice: Any = "auto"
    tools: list[dict[str, Any]]
    top_logprobs: int = 0
    top_p: float | None = 1.0
    truncation: str = "disabled"
    usage: ResponsesUsage | None = None
    user: str | None = None


class ItemList(msgspec.Struct, kw_only=True):
    object: str = "list"
    data: list[dict[str, Any]]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Deleted(msgspec.Struct):
    id: str
    object: str = "response"
    deleted: bool = True


def usage_of(prompt: int, cached: int, generated: int, thought: int) -> ResponsesUsage:
    return ResponsesUsage(
        input_tokens=prompt,
        input_tokens_details={"cached_tokens": cached, "cache_write_tokens": 0},
        output_tokens=generated,
        output_tokens_details={"reasoning_tokens": thought},
        total_tokens=prompt + generated,
    )
