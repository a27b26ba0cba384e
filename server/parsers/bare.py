"""Calls that are the whole of an answer: JSON, Python, or behind Mistral's mark.

The first characters decide: what cannot be a call streams on as text at once; what may be one is
held back to its end, and is text after all where it cannot be read.
"""

import ast
import re
from collections.abc import Callable
from typing import Any

from octavo.server.parsers.events import Event, Text, call, held
from octavo.server.parsers.tagged import calls_of, read_json_calls
from octavo.server.parsers.values import decode, encode

PYTHON_TAG = "<|python_tag|>"
TOOL_CALLS = "[TOOL_CALLS]"
_DOTTED = re.compile(r"\w+(?:\.\w+)*")
_NAMED = re.compile(r"\s*([\w.-]+)\s*(?:\[CALL_ID\][^\[{]*)?(?:\[ARGS\])?\s*(?=\{)")


class Whole:
    """An answer that begins with one of `starts` is read at its end, by `read`."""

    def __init__(self, starts: tuple[str, ...], read: Callable[[str], list[Event] | None]) -> None:
        self._starts, self._read = starts, read
        self._buffer = ""
        self._plain = False

    def feed(self, text: str) -> list[Event]:
        if self._plain:
            return [Text(text)] if text else []
        self._buffer += text
        start = self._buffer.lstrip()
        if start.startswith(self._starts) or any(s.startswith(start) for s in self._starts):
            return []
        self._plain = True
        ready, self._buffer = self._buffer, ""
        return [Text(ready)]

    def finish(self) -> list[Event]:
        rest, self._buffer = self._buffer, ""
        if not rest:
            return []
        return self._read(rest) or [Text(rest)]


class Behind:
    """Text up to a mark; behind it calls, read at the end."""

    def __init__(self, mark: str, read: Callable[[str], list[Event] | None]) -> None:
        self._mark, self._read = mark, read
        self._buffer, self._found = "", False

    def feed(self, text: str) -> list[Event]:
        self._buffer += text
        if self._found:
            return []
        at = self._buffer.find(self._mark)
        self._found = at >= 0
        if not self._found:
            at = len(self._buffer) - held(self._buffer, (self._mark,))
        ready, self._buffer = self._buffer[:at], self._buffer[at:]
        return [Text(ready)] if ready else []

    def finish(self) -> list[Event]:
        rest, self._buffer = self._buffer, ""
        found = self._read(rest) if self._found else None
        return found or ([Text(rest)] if rest else [])


def llama3_json() -> Whole:
    """{"name": ..., "parameters": {...}}; several are parted by a semicolon."""

    def read(text: str) -> list[Event] | None:
        return read_json_calls(text.strip().removeprefix(PYTHON_TAG), bare=True)

    return Whole((PYTHON_TAG, "{"), read)


def mistral() -> Behind:
    """[TOOL_CALLS] and a list of calls, or [TOOL_CALLS]name{...} for each."""

    def read(text: str) -> list[Event] | None:
        events: list[Event] = []
        for part in text.split(TOOL_CALLS)[1:]:
            found = _NAMED.match(part)
            if found is None:
                calls = read_json_calls(part)
            else:
                try:
                    arguments = decode(part[found.end() :])
                except (ValueError, RecursionError):
                    return None
                calls = calls_of({"name": found[1], "arguments": arguments})
            if calls is None:
                return None
            events += calls
        return events or None

    return Behind(TOOL_CALLS, read)


def pythonic() -> Whole:
    """[name(key=value, ...), ...], the values Python literals."""

    def read(text: str) -> list[Event] | None:
        try:
            tree = ast.parse(text.strip(), mode="eval").body
            if not isinstance(tree, ast.List) or not tree.elts:
                return None
            return [event for item in tree.elts for event in _python_call(item)]
        except (SyntaxError, TypeError, ValueError, RecursionError, MemoryError):
            return None

    return Whole(("[",), read)


def _python_call(node: ast.expr) -> list[Event]:
    if not isinstance(node, ast.Call) or node.args:
        raise ValueError("no call with named arguments")
    arguments: dict[str, Any] = {}
    for keyword in node.keywords:
        if keyword.arg is None or keyword.arg in arguments:
            raise ValueError("no call with named arguments")
        arguments[keyword.arg] = _literal(keyword.value)
    name = ast.unparse(node.func)
    if not _DOTTED.fullmatch(name):
        raise ValueError("no name of a tool")
    return call(name, encode(arguments))


class _JsonWords(ast.NodeTransformer):
    def visit_Name(self, node: ast.Name) -> ast.expr:
        words = {"true": True, "false": False, "null": None}
        return ast.Constant(words[node.id]) if node.id in words else node


def _literal(node: ast.expr) -> Any:
    """A Python literal; JSON's own words are taken as well."""
    return ast.literal_eval(_JsonWords().visit(node))
