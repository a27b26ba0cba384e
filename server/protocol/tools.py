"""Tools and what is said about them, in a chat body."""

import json
import re
from typing import Any

import msgspec

from octavo.server.protocol.errors import bad_request

MAX_TOOLS = 128
MAX_DEPTH = 64  # objects and lists inside each other
_NAME = re.compile(r"[\w.-]{1,64}", re.ASCII)


class Function(msgspec.Struct, kw_only=True, omit_defaults=True):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct, kw_only=True):
    type: str = "function"
    function: Function


def check_tools(tools: list[Tool]) -> None:
    """ApiError names what is wrong with the list."""
    if len(tools) > MAX_TOOLS:
        raise bad_request(f"`tools` takes at most {MAX_TOOLS}, got {len(tools)}", "tools")
    seen: set[str] = set()
    for i, tool in enumerate(tools):
        field, name = f"tools[{i}]", tool.function.name
        if tool.type != "function":
            raise bad_request(
                f"`{field}.type` must be function, got {tool.type!r}: this server runs no tools",
                f"{field}.type",
            )
        if not _NAME.fullmatch(name):
            raise bad_request(
                f"`{field}.function.name` must be 1 to 64 letters, digits or any of _ . -, "
                f"got {name[:80]!r}",
                f"{field}.function.name",
            )
        if name in seen:
            raise bad_request(f"`tools` names the function {name} twice", "tools")
        seen.add(name)
        kind = (tool.function.parameters or {}).get("type", "object")
        if kind != "object":
            raise bad_request(
                f"`{field}.function.parameters` must be the schema of an object, got {kind!r}",
                f"{field}.function.parameters",
            )
        _check_schema(f"{field}.function.parameters", tool.function.parameters or {})


def _check_schema(field: str, schema: dict[str, Any]) -> None:
    if _deeper(schema, MAX_DEPTH):
        raise bad_request(
            f"`{field}` may nest at most {MAX_DEPTH} levels deep, and is deeper", field
        )
    for key in ("properties", "$defs", "definitions"):
        if not isinstance(schema.get(key) or {}, dict):
            raise bad_request(f"`{field}.{key}` must be an object", f"{field}.{key}")


def _deeper(value: Any, levels: int) -> bool:
    """Whether lists and objects are inside each other more often; in no deep calls itself."""
    level = [value]
    for _ in range(levels + 1):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return bool(level)


def check_calls(i: int, message: dict[str, Any]) -> dict[str, Any]:
    """An assistant's message with its earlier calls as a template wants them: arguments decoded."""
    where = f"messages[{i}].tool_calls"
    calls = message["tool_calls"]
    if not isinstance(calls, list):
        raise bad_request(f"`{where}` must be a list", where)
    checked = []
    for j, one in enumerate(calls):
        function = one.get("function") if isinstance(one, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise bad_request(f"`{where}[{j}].function.name` must be a string", where)
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments) if arguments.strip() else {}
            except (ValueError, RecursionError):
                raise bad_request(f"`{where}[{j}].function.arguments` is not JSON", where) from None
        if arguments is None:
            arguments = {}
        if _deeper(arguments, MAX_DEPTH):
            raise bad_request(
                f"`{where}[{j}].function.arguments` may nest at most {MAX_DEPTH} levels deep", where
            )
        checked.append({**one, "function": {**function, "arguments": arguments}})
    return {**message, "tool_calls": checked}


def chosen(tool_choice: Any, tools: list[Tool]) -> str:
    """The name of the one function that must be called, "" where there is no such wish."""
    if not isinstance(tool_choice, dict):
        return ""
    function = tool_choice.get("function", tool_choice)  # some clients leave the inner object out
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        raise bad_request("`tool_choice.function.name` must be a string", "tool_choice")
    if name not in [tool.function.name for tool in tools]:
        raise bad_request(f"`tool_choice` names `{name}`, which is not in `tools`", "tool_choice")
    return name


def allowed(tool_choice: Any, tools: list[Tool]) -> tuple[Any, list[Tool]]:
    """`allowed_tools` as its mode, with the tools that it names; any other choice as it is.

    The names lie in an object of their own (Chat Completions) or beside the type (Responses).
    """
    if not isinstance(tool_choice, dict) or tool_choice.get("type") != "allowed_tools":
        return tool_choice, tools
    inner = tool_choice.get("allowed_tools", tool_choice)
    inner = inner if isinstance(inner, dict) else {}
    mode, named = inner.get("mode"), inner.get("tools")
    names = [chosen(one, tools) for one in named] if isinstance(named, list) else []
    if mode not in ("auto", "required") or not all(names) or not names:
        raise bad_request(
            "`tool_choice` of the type allowed_tools needs a `mode`, auto or required, and `tools` "
            "as objects with a name",
            "tool_choice",
        )
    return mode, [tool for tool in tools if tool.function.name in names]
