"""GET /v1/models and /v1/models/{id}."""

from starlette.requests import Request
from starlette.responses import Response

from octavo.server.frontend import Frontend
from octavo.server.protocol.models import ModelCard, ModelList
from octavo.server.respond import frontend_of, json_response


def _card(frontend: Frontend, name: str) -> ModelCard:
    ready = frontend.client.ready
    return ModelCard(
        id=name,
        created=frontend.started,
        root=frontend.model,
        max_model_len=ready.max_model_len if ready else None,
    )


async def listing(request: Request) -> Response:
    frontend = frontend_of(request)
    return json_response(ModelList([_card(frontend, name) for name in frontend.names]))


async def one(request: Request) -> Response:
    frontend = frontend_of(request)
    name = request.path_params["name"]
    frontend.check_model(name)
    return json_response(_card(frontend, name))
