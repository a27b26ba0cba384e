"""/openapi.json and /docs, both from the table of routes: what is served is what is described."""

import html
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from octavo import __version__
from octavo.server.endpoint import Endpoint
from octavo.server.protocol.errors import ErrorResponse

_PARAMETER = re.compile(r"\{(\w+)(?::\w+)?\}")
REFUSALS = {
    400: "The request cannot be served as it is; the message names the field",
    401: "The API key is missing or wrong",
    404: "There is no such thing here: the model, or what the path names",
    408: "The request ran into its own time limit, or its body did not come",
    413: "The body is larger than the server takes",
    422: "The request is understood and cannot be worked on",
    431: "The headers are larger than the server takes",
    499: "The client left before the answer",
    500: "A fault of the server; its log has the details",
    501: "The server does not do this",
    503: "Not now: starting, full or stopping; `Retry-After` says when to try again",
}


def document(
    endpoints: Sequence[Endpoint], needs_key: Callable[[str], bool] = lambda path: False
) -> dict[str, Any]:
    """The OpenAPI 3.1 description of `endpoints`; `needs_key` says which paths ask for a key."""
    types = [t for e in endpoints for t in (e.body, e.answer) if t is not None]
    schemas, components = msgspec.json.schema_components(
        [*types, ErrorResponse], ref_template="#/components/schemas/{name}"
    )
    *listed, error = schemas
    made = iter(listed)
    paths: dict[str, Any] = {}
    for endpoint in endpoints:
        body = next(made) if endpoint.body is not None else None
        answer = next(made) if endpoint.answer is not None else None
        operation = _operation(endpoint, body, answer, error)
        if needs_key(endpoint.path):
            operation["security"] = [{"key": []}]
        path = _PARAMETER.sub(r"{\1}", endpoint.path)
        paths.setdefault(path, {})[endpoint.method.lower()] = operation
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Octavo",
            "version": __version__,
            "description": "Large language models over HTTP, as OpenAI's clients speak to them.",
        },
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(endpoint: Endpoint, body: Any, answer: Any, error: Any) -> dict[str, Any]:
    content = {} if answer is None else {"application/json": {"schema": answer}}
    if endpoint.media_type:
        content[endpoint.media_type] = {"schema": {"type": "string"}}
    if endpoint.streams:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    operation: dict[str, Any] = {
        "summary": endpoint.summary,
        "operationId": _name(endpoint),
        "responses": {
            "200": {"description": "The answer", "content": content},
            **{
                str(status): {
                    "description": text,
                    "content": {"application/json": {"schema": error}},
                }
                for status, text in REFUSALS.items()
            },
        },
    }
    names = _PARAMETER.findall(endpoint.path)
    if names:
        operation["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
            for name in names
        ]
    if body is not None:
        operation["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": body}},
        }
    return operation


def _name(endpoint: Endpoint) -> str:
    words = re.findall(r"\w+", _PARAMETER.sub(r"by_\1", endpoint.path))
    return "_".join([endpoint.method.lower(), *words])


# --- the page that people read

_STYLE = """
:root { color-scheme: light dark; --line: color-mix(in srgb, currentColor 18%, transparent); }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 1rem; }
details { border: 1px solid var(--line); border-radius: 8px; margin: .5rem 0; padding: .5rem; }
summary { cursor: pointer; } summary b { display: inline-block; min-width: 4rem; }
code, pre { font: 14px/1.45 ui-monospace, monospace; }
pre { overflow-x: auto; padding: .8rem; border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: collapse; width: 100%; }
td { border-top: 1px solid var(--line); padding: .25rem .6rem .25rem 0; vertical-align: top; }
td:first-child { white-space: nowrap; } .type { opacity: .7; }
"""


def page(described: dict[str, Any]) -> str:
    """The same description as HTML: routes, their fields, a command to try each."""
    rows = [
        _section(path, method, operation, described["components"]["schemas"])
        for path, methods in described["paths"].items()
        for method, operation in methods.items()
    ]
    info = described["info"]
    return (
        "<!doctype html><html lang=en><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width'>"
        f"<title>{info['title']} API</title><style>{_STYLE}</style>"
        f"<h1>{info['title']} {info['version']}</h1><p>{html.escape(info['description'])} "
        "The same as data: <a href=openapi.json>openapi.json</a>.</p>" + "".join(rows) + "</html>\n"
    )


def _section(path: str, method: str, operation: dict[str, Any], schemas: dict[str, Any]) -> str:
    body = operation.get("requestBody", {}).get("content", {}).get("application/json")
    schema = _resolved(body["schema"], schemas) if body else {}
    required = schema.get("required", [])
    fields = "".join(
        f"<tr><td><code>{html.escape(name)}</code>{' *' if name in required else ''}</td>"
        f"<td class=type>{html.escape(_type(field))}</td></tr>"
        for name, field in schema.get("properties", {}).items()
    )
    command = f"curl http://HOST{path}"
    if body:
        example = json.dumps({name: "..." for name in required})
        command += f" -H 'Content-Type: application/json' -d '{example}'"
    elif method == "post":
        command += " -X POST"
    return (
        f"<details><summary><b>{method.upper()}</b> <code>{html.escape(path)}</code> "
        f"&nbsp;{html.escape(operation['summary'])}</summary>"
        f"<pre>{html.escape(command)}</pre>"
        + (f"<table>{fields}</table><p>* required</p>" if fields else "")
        + "</details>"
    )


def _resolved(schema: dict[str, Any], schemas: dict[str, Any]) -> dict[str, Any]:
    reference = schema.get("$ref")
    resolved: dict[str, Any] = schemas[reference.rsplit("/", 1)[1]] if reference else schema
    return resolved


def _type(schema: dict[str, Any]) -> str:
    """A schema in a few words."""
    if "$ref" in schema:
        return str(schema["$ref"]).rsplit("/", 1)[1]
    if "anyOf" in schema:
        return " or ".join(_type(option) for option in schema["anyOf"])
    if "enum" in schema:
        return " or ".join(map(str, schema["enum"]))
    kind = str(schema.get("type", "anything"))
    return f"list of {_type(schema['items'])}" if schema.get("items") else kind
