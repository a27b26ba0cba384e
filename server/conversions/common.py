"""What the conversions share."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec

from octavo.server.protocol.chat import ChatCompletionRequest
from octavo.server.protocol.errors import ApiError, bad_request, from_validation
from octavo.server.protocol.sampling import GenerationRequest
from octavo.server.protocol.tools import Tool

OWN = ("stream_options",)  # about the form of the answer, which is not chat's


def chat_of(
    body: GenerationRequest, messages: list[dict[str, Any]], **values: Any
) -> ChatCompletionRequest:
    """A chat body with what `body` has in common with it, and `values`."""
    common = {f: getattr(body, f) for f in GenerationRequest.__struct_fields__ if f not in OWN}
    own = {k: v for k, v in values.items() if k in ChatCompletionRequest.__struct_fields__}
    if own.get("tools"):
        try:
            own["tools"] = msgspec.convert(own["tools"], list[Tool])
        except msgspec.ValidationError as error:
            raise from_validation(error) from None
    return ChatCompletionRequest(messages=messages, **(common | own))


@contextmanager
def own_names(names: dict[str, str]) -> Iterator[None]:
    """Errors about chat's fields name the fields of the body that was sent."""
    try:
        yield
    except ApiError as error:
        for name, own in names.items():
            error.message = re.sub(rf"`{re.escape(name)}(?=[`.\[])", f"`{own}", error.message)
            if error.param is not None and error.param.partition(".")[0] == name:
                error.param = own + error.param[len(name) :]
        raise


def only_text(part: dict[str, Any], where: str, kinds: Sequence[str]) -> str:
    """The text of a part whose type is one of `kinds`; ApiError 400 for all others."""
    kind, text = part.get("type"), part.get("text")
    if kind not in kinds:
        raise unknown_part(kind, where, kinds)
    if not isinstance(text, str):
        raise bad_request(f"`{where}.text` must be a string", f"{where}.text")
    return text


def unknown_part(kind: Any, where: str, kinds: Sequence[str]) -> ApiError:
    """A part that this server cannot read."""
    names = ", ".join(f"`{name}`" for name in kinds)
    return bad_request(f"`{where}.type` must be one of {names} here, got {kind!r}", f"{where}.type")


def text_field(item: dict[str, Any], field: str, where: str) -> str:
    """A field that must be a string."""
    value = item.get(field)
    if not isinstance(value, str):
        raise bad_request(f"`{where}.{field}` must be a string", f"{where}.{field}")
    return value


def objects(values: Any, where: str) -> list[dict[str, Any]]:
    """A list of JSON objects."""
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        raise bad_request(f"`{where}` must be a list of objects", where)
    return values


def function_tool(
    name: str, description: Any, parameters: Any, strict: Any = None
) -> dict[str, Any]:
    """A tool as chat has it."""
    function = {"name": name, "description": description, "parameters": parameters}
    function |= {} if strict is None else {"strict": strict}
    return {"type": "function", "function": {k: v for k, v in function.items() if v is not None}}


def call(call_id: str, name: str, arguments: str) -> dict[str, Any]:
    """A call of a tool as chat has it; `arguments` is JSON text."""
    return {
        "id": call_id,
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }
