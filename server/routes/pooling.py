"""POST /v1/embeddings, /v1/score and /v1/rerank: what models that read are asked."""

from starlette.requests import Request
from starlette.responses import Response

from octavo.server.frontend import RequestId
from octavo.server.protocol.pooling import (
    Embedding,
    EmbeddingRequest,
    EmbeddingResponse,
    RerankRequest,
    RerankResponse,
    RerankUsage,
    Score,
    ScoreRequest,
    ScoreResponse,
    ranked,
)
from octavo.server.protocol.sampling import usage_of
from octavo.server.respond import frontend_of, json_response, read_body
from octavo.server.streaming import while_connected


async def embeddings(request: Request) -> Response:
    frontend = frontend_of(request)
    body = await read_body(request, EmbeddingRequest)
    frontend.check_model(body.model)
    name = RequestId.of(request, body, "embd")
    made = await while_connected(request, frontend.pooling.embed(body, name.public))
    encoding = body.encoding_format
    answer = EmbeddingResponse(
        id=name.public,
        created=name.created,
        model=body.model or frontend.names[0],
        data=[Embedding.of(i, vector, encoding) for i, vector in enumerate(made.vectors)],
        usage=usage_of(made.tokens, 0),
    )
    return json_response(answer, request_id=name.public)


async def score(request: Request) -> Response:
    frontend = frontend_of(request)
    body = await read_body(request, ScoreRequest)
    frontend.check_model(body.model)
    name = RequestId.of(request, body, "score")
    first, second = body.sides()
    made = await while_connected(request, frontend.pooling.score(first, second, body, name.public))
    answer = ScoreResponse(
        id=name.public,
        created=name.created,
        model=body.model or frontend.names[0],
        data=[Score(index=i, score=score) for i, score in enumerate(made.scores)],
        usage=usage_of(made.tokens, 0),
    )
    return json_response(answer, request_id=name.public)


async def rerank(request: Request) -> Response:
    frontend = frontend_of(request)
    body = await read_body(request, RerankRequest)
    frontend.check_model(body.model)
    name = RequestId.of(request, body, "rerank")
    work = frontend.pooling.score([body.query], body.texts(), body, name.public, "documents")
    made = await while_connected(request, work)
    answer = RerankResponse(
        id=name.public,
        model=body.model or frontend.names[0],
        usage=RerankUsage(made.tokens, made.tokens),
        results=ranked(body, made.scores),
    )
    return json_response(answer, request_id=name.public)
