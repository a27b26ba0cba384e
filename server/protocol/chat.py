"""/v1/chat/completions: bodies in and out."""

from typing import Any

import msgspec

from octavo.server.protocol.errors import bad_request, not_yet
from octavo.server.protocol.sampling import GenerationRequest, Usage
from octavo.server.protocol.structured import asked_form
from octavo.server.protocol.tools import Tool, allowed, check_calls, check_tools, chosen


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
    include_reasoning: bool | None = None
    tools: list[Tool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    functions: list[Any] | None = None
    function_call: Any = None
    modalities: list[str] | None = None
    audio: Any = None

    def check(self) -> None:
        super().check()
        for field, instead in (
            ("functions", "use `tools`"),
            ("function_call", "use `tool_choice`"),
            ("audio", "leave it out"),
        ):
            if getattr(self, field):
                raise not_yet(field, instead)
        self._check_tools()
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

    def _check_tools(self) -> None:
        check_tools(self.tools or [])
        choice, tools = allowed(self.tool_choice, self.tools or [])
        self.tool_choice, self.tools = choice, tools or None
        if isinstance(choice, str) and choice not in ("none", "auto", "required"):
            raise bad_request(
                f"`tool_choice` must be none, auto, required or name a function, got {choice!r}",
                "tool_choice",
            )
        if self.must_call:
            if not self.tools:
                raise bad_request("`tool_choice` needs `tools` to choose from", "tool_choice")
            chosen(self.tool_choice, self.tools)
            if asked_form(self)[1] is not None:
                raise bad_request(
                    f"`{self.form_field}` excludes a `tool_choice` that forces a call: send one",
                    self.form_field,
                )

    @property
    def must_call(self) -> bool:
        """A tool must be called; a grammar sees to it."""
        return self.tool_choice == "required" or isinstance(self.tool_choice, dict)

    @property
    def uses_tools(self) -> bool:
        """Tools may be called."""
        return bool(self.tools) and self.tool_choice != "none"

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
    if message.get("tool_calls"):
        message = check_calls(i, message)
    thought = message.get("reasoning", message.get("reasoning_content"))
    if isinstance(thought, str):  # templates know the second name
        message = {**message, "reasoning_content": thought}
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


class CalledFunction(msgspec.Struct):
    name: str
    arguments: str


class MessageToolCall(msgspec.Struct):
    id: str
    function: CalledFunction
    type: str = "function"


class ChatMessage(msgspec.Struct):
    role: str
    content: str | None
    refusal: None = None
    reasoning: str | msgspec.UnsetType = msgspec.UNSET
    tool_calls: list[MessageToolCall] | msgspec.UnsetType = msgspec.UNSET


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
