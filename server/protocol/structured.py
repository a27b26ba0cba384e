"""The forms that a request may ask its text to have, in each spelling there is."""

from typing import Any

import msgspec

from octavo.engine.sampling_params import ParameterError, StructuredOutputsParams
from octavo.server.protocol.errors import ApiError, bad_request

GUIDED = ("json", "regex", "choice", "grammar")  # the older names: guided_json and so on
FORMATS = ("text", "json_object", "json_schema", "structural_tag")


def from_response_format(value: Any, field: str = "response_format") -> Any:
    """StructuredOutputsParams of a `response_format`, None for free text. ApiError names `field`.

    A schema may stand under `json_schema.schema`, or beside the type under `schema` (as it does in
    the Responses API).
    """
    if value is None:
        return None
    if not isinstance(value, dict):
        raise bad_request(f"`{field}` must be an object with a `type`", field)
    kind = value.get("type", "text")
    if kind not in FORMATS:
        raise bad_request(
            f"`{field}.type` must be one of {', '.join(FORMATS)}, got {kind!r}", field
        )
    if kind == "text":
        return None
    if kind == "structural_tag":
        return _make({"structural_tag": msgspec.json.encode(value).decode()}, field)
    schema = value.get("schema")
    if kind == "json_schema":
        wrapped = value.get("json_schema")
        if isinstance(wrapped, dict):
            schema = wrapped.get("schema", wrapped.get("json_schema", schema))
        if schema is None:
            raise bad_request(f"`{field}.json_schema.schema` is required", field)
    if schema is None:
        return _make({"json_object": True}, field)
    return _make({"json": schema}, field)


def from_structured_outputs(value: Any, field: str = "structured_outputs") -> Any:
    """StructuredOutputsParams of an object with their fields; None for None."""
    if value is None:
        return None
    if not isinstance(value, dict):
        raise bad_request(f"`{field}` must be an object", field)
    known = StructuredOutputsParams.__struct_fields__
    if unknown := sorted(value.keys() - set(known)):
        raise bad_request(
            f"`{field}` has no field `{unknown[0]}`; there are {', '.join(known)}", field
        )
    return _make({k: v for k, v in value.items() if v is not None}, field)


def asked_form(body: Any) -> tuple[str, StructuredOutputsParams | None]:
    """The field by which a body asks for a form, and that form. ApiError where there are two."""
    found: dict[str, StructuredOutputsParams] = {}
    if (form := from_response_format(body.response_format)) is not None:
        found["response_format"] = form
    if (form := from_structured_outputs(body.structured_outputs)) is not None:
        found["structured_outputs"] = form
    for kind in GUIDED:
        if (value := getattr(body, f"guided_{kind}")) is not None:
            fields = {kind: value}
            if body.guided_whitespace_pattern is not None:
                fields["whitespace_pattern"] = body.guided_whitespace_pattern
            found[f"guided_{kind}"] = _make(fields, f"guided_{kind}")
    if len(found) > 1:
        names = " and ".join(f"`{name}`" for name in found)
        raise bad_request(f"{names} exclude each other: send one", list(found)[1])
    return next(iter(found.items()), ("structured_outputs", None))


def _make(fields: dict[str, Any], field: str) -> StructuredOutputsParams:
    try:
        return msgspec.convert(fields, StructuredOutputsParams)
    except msgspec.ValidationError as error:
        text = str(error).replace("`structured_outputs` ", "")
        raise bad_request(f"`{field}`: {text[0].lower()}{text[1:]}", field) from None


def form_error(error: ParameterError, field: str) -> ApiError:
    """The answer to a form that cannot be served, in the words of the request."""
    name = field if error.parameter == "structured_outputs" else error.parameter
    return bad_request(f"`{name}` {error.problem}", name)
