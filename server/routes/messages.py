"""POST /v1/messages and /v1/messages/count_tokens: a turn in Anthropic's words."""

import logging
from collections.abc import AsyncIterator

from starlette.requests import Request
from starlette.responses import Response

from octavo.server.conversions.common import own_names
from octavo.server.conversions.messages import NAMES, to_chat
from octavo.server.dialogue import Turn, begin
from octavo.server.frontend import Frontend, RequestId
from octavo.server.message_events import Blocks, failure
from octavo.server.protocol.errors import ApiError
from octavo.server.protocol.messages import (
    CountTokensRequest,
    MessagesRequest,
    MessagesUsage,
    TokensCount,
)
from octavo.server.respond import frontend_of, json_response, read_body
from octavo.server.streaming import EventStream, while_connected

logger = logging.getLogger("octavo.server")


async def create(request: Request) -> Response:
    frontend = frontend_of(request)
    body = await read_body(request, MessagesRequest)
    name = RequestId.of(request, body, "msg_")
    with own_names(NAMES):
        turn = await begin(frontend, to_chat(body), name.public)
    if body.stream:
        stream = _stream(turn, frontend, name)
        return _named(EventStream(stream, turn.cancel, name.public, done=b""), name)
    try:
        choices = await while_connected(request, turn.whole())
    finally:
        turn.cancel()
    blocks = Blocks(name.public, _model(turn, frontend))
    blocks.add(choices[0])
    blocks.end()
    said = choices[0]
    usage = await _usage(turn, frontend, blocks, len(said.token_ids), said.cached_tokens)
    return _named(json_response(blocks.message(usage), request_id=name.public), name)


async def count_tokens(request: Request) -> Response:
    frontend = frontend_of(request)
    body = await read_body(request, CountTokensRequest)
    chat = to_chat(body)
    frontend.check_model(chat.model)
    with own_names(NAMES):
        chat.check()
        prompt = await frontend.chat_prompt(chat)
    return json_response(TokensCount(len(prompt.token_ids)))


async def _stream(turn: Turn, frontend: Frontend, name: RequestId) -> AsyncIterator[bytes]:
    blocks = Blocks(name.public, _model(turn, frontend))
    asked, generated, cached, begun = len(turn.prompt.token_ids), 0, 0, False
    try:
        async for batch in turn.deltas():
            frames = []
            for delta in batch:
                generated += len(delta.token_ids)
                cached = max(cached, delta.cached_tokens)
                if not begun:  # only now is known what the cache had
                    begun = True
                    frames.append(blocks.start(MessagesUsage(asked - cached, 0, cached)))
                frames.append(blocks.add(delta))
            yield b"".join(frames)
        last = blocks.end()
        yield last + blocks.stop(await _usage(turn, frontend, blocks, generated, cached))
    except ApiError as error:
        yield failure(error, name.public)
    except Exception:
        logger.exception("a stream failed")
        yield failure(_bug(), name.public)


async def _usage(
    turn: Turn, frontend: Frontend, blocks: Blocks, generated: int, cached: int
) -> MessagesUsage:
    """What it took. Thought is counted by its text, so a token more or less is possible."""
    details = None
    if blocks.thought:
        thought = len(await frontend.encode(blocks.thought, False))
        details = {"thinking_tokens": min(thought, generated)}
    return MessagesUsage(
        input_tokens=len(turn.prompt.token_ids) - cached,
        output_tokens=generated,
        cache_read_input_tokens=cached,
        output_tokens_details=details,
    )


def _model(turn: Turn, frontend: Frontend) -> str:
    return turn.body.model or frontend.names[0]


def _named(response: Response, name: RequestId) -> Response:
    """With the header in which Anthropic's clients look for the name."""
    response.headers["request-id"] = name.public
    return response


def _bug() -> ApiError:
    return ApiError(500, "internal error; the server's log has the details")
