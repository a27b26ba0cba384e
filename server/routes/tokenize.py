"""POST /tokenize and /detokenize: the model's tokenizer, without the engine."""

from starlette.requests import Request
from starlette.responses import Response

from octavo.server.protocol.errors import bad_request
from octavo.server.protocol.models import (
    DetokenizeRequest,
    DetokenizeResponse,
    TokenizeRequest,
    TokenizeResponse,
)
from octavo.server.respond import frontend_of, json_response, read_body


async def tokenize(request: Request) -> Response:
    frontend = frontend_of(request)
    body = await read_body(request, TokenizeRequest)
    frontend.check_model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise bad_request("give either `prompt` or `messages`", "prompt")
    if body.prompt is not None:
        add = True if body.add_special_tokens is None else body.add_special_tokens
        tokens = await frontend.encode(body.prompt, add)
    else:
        tokens = (await frontend.chat_prompt(body.as_chat())).token_ids
    ready = frontend.client.ready
    length = ready.max_model_len if ready else None
    strings = frontend.token_strings(tokens) if body.return_token_strs else None
    return json_response(TokenizeResponse(len(tokens), length, tokens, strings))


async def detokenize(request: Request) -> Response:
    frontend = frontend_of(request)
    body = await read_body(request, DetokenizeRequest)
    frontend.check_model(body.model)
    return json_response(DetokenizeResponse(frontend.decode(body.tokens)))
