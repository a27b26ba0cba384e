"""Tools in a chat request: checked, shown to the model, and the grammar where a call is a must."""

import json
from typing import Any

from octavo.engine.sampling_params import StructuredOutputsParams
from octavo.server.protocol.tools import Tool

MENTION = (
    "You may call functions. Their signatures, one JSON object a line:\n"
    "<tools>\n{tools}\n</tools>\n"
    "To call one, answer with a JSON object between marks, for each call:\n"
    '<tool_call>\n{{"name": "the function", "arguments": {{"its": "arguments"}}}}\n</tool_call>'
)


def forced_form(tools: list[Tool], name: str, several: bool) -> StructuredOutputsParams:
    """The form of the text: one function's arguments, or a list of calls where `name` is ""."""
    if name:
        [tool] = [tool for tool in tools if tool.function.name == name]
        return StructuredOutputsParams(json=tool.function.parameters or {"type": "object"})
    definitions: dict[str, Any] = {}
    options = []
    for i, tool in enumerate(tools):
        parameters = _hoisted(tool.function.parameters or {"type": "object"}, i, definitions)
        options.append(
            {
                "type": "object",
                "properties": {"name": {"enum": [tool.function.name]}, "parameters": parameters},
                "required": ["name", "parameters"],
                "additionalProperties": False,
            }
        )
    schema: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"anyOf": options}}
    if not several:
        schema["maxItems"] = 1
    if definitions:
        schema["$defs"] = definitions
    return StructuredOutputsParams(json=schema)


def _hoisted(schema: dict[str, Any], tool: int, definitions: dict[str, Any]) -> dict[str, Any]:
    """The schema as part of a larger one: its definitions move to the root, under other names."""
    own = {
        f"#/{place}/{name}": f"tool{tool}_{name}"
        for place in ("$defs", "definitions")
        for name in schema.get(place) or {}
    }

    def moved(value: Any, schema: bool = True) -> Any:
        """`schema`: its keys are words of JSON Schema, not names that the user gave."""
        if isinstance(value, list):
            return [moved(item) for item in value]
        if not isinstance(value, dict):
            return value
        out = {
            k: moved(v, not schema or k not in ("properties", "patternProperties"))
            for k, v in value.items()
            if not (schema and k in ("$defs", "definitions"))
        }
        reference = value.get("$ref")
        if schema and isinstance(reference, str) and reference in own:
            out["$ref"] = f"#/$defs/{own[reference]}"
        return out

    for place in ("$defs", "definitions"):
        for name, value in (schema.get(place) or {}).items():
            definitions[own[f"#/{place}/{name}"]] = moved(value)
    hoisted: dict[str, Any] = moved(schema)
    return hoisted


def mentioned(messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The conversation with the tools in its system message: for templates that know no tools."""
    lines = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    mention = MENTION.format(tools=lines)
    if messages and messages[0].get("role") == "system":
        first = {**messages[0], "content": f"{messages[0]['content']}\n\n{mention}"}
        return [first, *messages[1:]]
    return [{"role": "system", "content": mention}, *messages]


def plainly(message: dict[str, Any]) -> dict[str, Any]:
    """A message as text alone: for templates that know no tools."""
    if message.get("role") == "tool":
        return {
            "role": "user",
            "content": f"<tool_response>\n{message['content']}\n</tool_response>",
        }
    calls = message.get("tool_calls")
    if not calls:
        return message
    lines = [message["content"]] if message["content"] else []
    for one in calls:
        written = json.dumps(one["function"], ensure_ascii=False)
        lines.append(f"<tool_call>\n{written}\n</tool_call>")
    rest = {k: v for k, v in message.items() if k != "tool_calls"}
    return {**rest, "content": "\n".join(lines)}
