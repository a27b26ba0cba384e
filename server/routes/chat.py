"""POST /v1/chat/completions: render, submit, answer."""

from collections.abc import AsyncIterator

from starlette.requests import Request
from starlette.responses import Response

from octavo.server.chunks import Chunks
from octavo.server.collect import Delta
from octavo.server.dialogue import Turn, begin
from octavo.server.frontend import Frontend, RequestId
from octavo.server.logprobs import chat_logprobs, prompt_logprobs
from octavo.server.protocol.chat import (
    CalledFunction,
    ChatChoice,
    ChatCompletionRequest,
    ChatCompletionResponse,
    ChatMessage,
    ChoiceLogprobs,
    MessageToolCall,
)
from octavo.server.protocol.sampling import usage_of
from octavo.server.respond import frontend_of, json_response, read_body
from octavo.server.streaming import EventStream, while_connected

ROLE = "assistant"


async def create(request: Request) -> Response:
    frontend = frontend_of(request)
    body = await read_body(request, ChatCompletionRequest)
    name = RequestId.of(request, body, "chatcmpl")
    turn = await begin(frontend, body, name.public)
    if body.stream:
        stream = _stream(turn, frontend, name)
        return EventStream(stream, on_end=turn.cancel, request_id=name.public)
    try:
        choices = await while_connected(request, turn.whole())
    finally:
        turn.cancel()
    return json_response(_whole(turn, frontend, name, choices), request_id=name.public)


def _logprobs(body: ChatCompletionRequest, delta: Delta) -> ChoiceLogprobs | None:
    if not delta.logprobs:
        return None
    as_ids = bool(body.return_tokens_as_token_ids)
    top = -1 if body.logprob_token_ids else body.top_logprobs or 0
    return chat_logprobs(delta.token_ids, delta.logprobs, top, as_ids)


def _message(choice: Delta) -> ChatMessage:
    message = ChatMessage(ROLE, choice.text)
    if choice.reasoning:
        message.reasoning = choice.reasoning
    if choice.tool_calls:
        message.content = choice.text or None
        message.tool_calls = [
            MessageToolCall(call.id or "", CalledFunction(call.name or "", call.arguments))
            for call in choice.tool_calls
        ]
    return message


def _whole(
    turn: Turn, frontend: Frontend, name: RequestId, choices: list[Delta]
) -> ChatCompletionResponse:
    body, prompt = turn.body, turn.prompt
    generated = sum(len(choice.token_ids) for choice in choices)
    cached = max((choice.cached_tokens for choice in choices), default=0)
    return ChatCompletionResponse(
        id=name.public,
        created=name.created,
        model=body.model or frontend.names[0],
        choices=[
            ChatChoice(
                index=choice.index,
                message=_message(choice),
                logprobs=_logprobs(body, choice),
                finish_reason=choice.finish_reason,
                stop_reason=choice.stop_reason,
                token_ids=choice.token_ids if body.return_token_ids else None,
            )
            for choice in choices
        ],
        usage=usage_of(len(prompt.token_ids), generated, cached, turn.reasoning_tokens),
        prompt_logprobs=prompt_logprobs(choices[0].prompt_logprobs) if choices else None,
        prompt_token_ids=prompt.token_ids if body.return_token_ids else None,
    )


async def _stream(turn: Turn, frontend: Frontend, name: RequestId) -> AsyncIterator[bytes]:
    body, prompt = turn.body, turn.prompt
    model = body.model or frontend.names[0]
    chunks = Chunks("chat.completion.chunk", name.public, name.created, model)
    prompt_ids = prompt.token_ids if body.return_token_ids else None
    asked, generated, cached = len(prompt.token_ids), 0, 0
    spoken: set[int] = set()  # choices whose role has been said
    async for batch in turn.deltas():
        frames = []
        for delta in batch:
            generated += len(delta.token_ids)
            cached = max(cached, delta.cached_tokens)
            if delta.index not in spoken:
                spoken.add(delta.index)
                frames.append(chunks.role(delta.index, prompt_ids))
            logprobs = _logprobs(body, delta)
            token_ids = delta.token_ids if body.return_token_ids else None
            usage = None
            if body.continuous_usage:
                usage = usage_of(asked, generated, cached, turn.reasoning_tokens)
            if delta.reasoning or delta.tool_calls:
                frames.append(chunks.parts(delta, logprobs, token_ids, usage))
            elif delta.text or delta.finish or logprobs or token_ids:
                frames.append(
                    chunks.text(delta.index, delta.text, delta.finish, logprobs, token_ids, usage)
                )
        if frames:
            yield b"".join(frames)
    if body.include_usage:
        yield chunks.usage(usage_of(asked, generated, cached, turn.reasoning_tokens))
