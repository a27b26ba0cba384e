"""/v1/chat/completions: bodies in and out."""

from typing import Any

import msgspec

from octavo.server.protocol.errors import bad_request, not_yet
from octavo.server.protocol.sampling import GenerationRequest, Usage


class ChatCompletionRequest(GenerationRequest, kw_only=True):
    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: list[dict[str, Any]] | None = None
    reasoning_effort: str | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    functions: list[Any] | None = None
    function_call: Any = None
    modalities: list[str] | None = None
    audio: Any = None

    def check(self) -> None:
        super().check()
        for field in ("tools", "functions", "function_call", "audio"):
            if getattr(self, field):
                raise not_yet(field, "leave it out")
        if self.tool_choice not in (None, "none", "auto"):
            raise not_yet("tool_choice", "leave it out")
        if self.modalities not in (None, ["text"]):
            raise not_yet("modalities", "only text is")
        if not self.messages:
            raise bad_request("`messages` must not be empty", "messages")
        if self.top_logprobs is not None and not self.logprobs:
            raise bad_request("`top_logprobs` needs `logprobs` to be true", "top_logprobs")
        if self.continue_final_message and self.add_generation_prompt:
            raise bad_request(
                "`continue_final_message` and `add_generation_prompt` exclude each other",
                "continue_final_message",
            )

    @property
    def most_tokens(self) -> int | None:
        """`max_completion_tokens`, or its older name."""
        newer = self.max_completion_tokens
        return self.max_tokens if newer is None else newer

    def conversation(self) -> list[dict[str, Any]]:
        """The messages with their content as one string each."""
        return [_message(i, message) for i, message in enumerate(self.messages)]


def _message(i: int, message: dict[str, Any]) -> dict[str, Any]:
    where = f"messages[{i}]"
    if not isinstance(message.get("role"), str):
        raise bad_request(f"`{where}.role` must be a string", f"{where}.role")
    content = message.get("content")
    if content is None:
        return {**message, "content": ""}
    if isinstance(content, str):
        return message
    if not isinstance(content, list):
        raise bad_request(
            f"`{where}.content` must be a string or a list of parts", f"{where}.content"
        )
    texts = []
    for part in content:
        kind = part.get("type", "text") if isinstance(part, dict) else None
        text = part.get("text") if isinstance(part, dict) else None
        if kind not in ("text", "input_text") or not isinstance(text, str):
            raise bad_request(
                f"`{where}.content` takes text parts only: this model reads no {kind}",
                f"{where}.content",
            )
        texts.append(text)
    return {**message, "content": "\n".join(texts)}


class TopLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(msgspec.Struct):
    content: list[TokenLogprob]


class ChatMessage(msgspec.Struct):
    role: str
    content: str
    refusal: None = None


class ChatChoice(msgspec.Struct, kw_only=True):
    index: int
    message: ChatMessage
    logprobs: ChoiceLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None


class ChatCompletionResponse(msgspec.Struct, kw_only=True):
    id: str
    object: str = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str | None = None
    prompt_logprobs: list[Any] | None = None
    prompt_token_ids: list[int] | None = None
