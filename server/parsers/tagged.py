"""Calls between two marks, <tool_call> ... </tool_call>: as JSON or as tags of their own."""

import json
import re
from collections.abc import Callable
from typing import Any

from octavo.server.parsers.events import Event, Text, call, held

OPEN, CLOSE = "<tool_call>", "</tool_call>"
Schemas = dict[str, dict[str, Any]]  # the parameters' JSON schema, by the tool's name
_FUNCTION = re.compile(r"\s*<function=([^>\s]+)>(.*?)(?:</function>\s*|$)", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\s]+)>(.*?)(?:</parameter>|(?=<parameter=)|$)", re.DOTALL)


class Tagged:
    """`read` makes events of what stands between the marks; None where it is no call.

    A call is given out when it is whole. One that cannot be read is text, marks and all.
    """

    def __init__(self, read: Callable[[str], list[Event] | None]) -> None:
        self._read = read
        self._buffer, self._inside = "", False

    def feed(self, text: str) -> list[Event]:
        self._buffer += text
        events: list[Event] = []
        while True:
            mark = CLOSE if self._inside else OPEN
            at = self._end() if self._inside else self._buffer.find(mark)
            if at < 0:
                break
            part, self._buffer = self._buffer[:at], self._buffer[at + len(mark) :]
            if self._inside:
                found = self._read(part)
                events += [Text(OPEN + part + CLOSE)] if found is None else found
            elif part:
                events.append(Text(part))
            self._inside = not self._inside
        if not self._inside:
            keep = held(self._buffer, (OPEN,))
            ready, self._buffer = (
                self._buffer[: len(self._buffer) - keep],
                self._buffer[len(self._buffer) - keep :],
            )
            if ready:
                events.append(Text(ready))
        return events

    def _end(self) -> int:
        """Where the call's closing mark begins: not inside a JSON string. -1: not there yet."""
        start = 0
        while (at := self._buffer.find(CLOSE, start)) >= 0:
            if not _in_string(self._buffer[:at]):
                return at
            start = at + 1
        return -1

    def finish(self) -> list[Event]:
        rest, self._buffer = self._buffer, ""
        if not self._inside:
            return [Text(rest)] if rest else []
        self._inside = False
        for at in (len(rest), rest.find(CLOSE)):  # the closing mark was left out, or in a string
            found = self._read(rest[:at]) if at >= 0 else None
            if found is not None:
                tail = rest[at:].removeprefix(CLOSE)
                return found + ([Text(tail)] if tail else [])
        return [Text(OPEN + rest)]


def _in_string(text: str) -> bool:
    """Whether JSON text ends inside a string."""
    if not text.lstrip().startswith(("{", "[")):
        return False
    inside = escaped = False
    for character in text:
        if escaped:
            escaped = False
        elif character == "\\":
            escaped = inside
        elif character == '"':
            inside = not inside
    return inside


def read_json_calls(text: str) -> list[Event] | None:
    """{"name": ..., "arguments": {...}}, or several of them; None where it is anything else."""
    events: list[Event] = []
    decoder = json.JSONDecoder()
    at, text = 0, text.strip()
    while at < len(text):
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            return None
        found = calls_of(value)
        if found is None:
            return None
        events += found
        while at < len(text) and (text[at].isspace() or text[at] in ";,"):
            at += 1
    return events or None


def calls_of(value: Any) -> list[Event] | None:
    """The calls in a decoded object or list of objects; None where one is no call."""
    if isinstance(value, list):
        parts = [calls_of(item) for item in value]
        if not parts or any(part is None for part in parts):
            return None
        return [event for part in parts for event in part or ()]
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not value["name"]:
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        return call(value["name"], arguments)
    if not isinstance(arguments, dict):
        return None
    return call(value["name"], json.dumps(arguments, ensure_ascii=False))


def xml_reader(schemas: Schemas) -> Callable[[str], list[Event] | None]:
    """Reads <function=NAME> <parameter=KEY> VALUE </parameter> ... </function>.

    A value is text where the tool's schema says string, and else what its JSON says.
    """

    def read(text: str) -> list[Event] | None:
        events: list[Event] = []
        at, text = 0, text.strip()
        while at < len(text):
            found = _FUNCTION.match(text, at)
            if found is None or found.end() == at:
                return None
            schema = schemas.get(found[1], {}).get("properties", {})
            arguments = {
                key: _value(value, schema.get(key)) for key, value in _PARAMETER.findall(found[2])
            }
            events += call(found[1], json.dumps(arguments, ensure_ascii=False))
            at = found.end()
        return events or None

    return read


def _value(text: str, schema: Any) -> Any:
    text = text.removeprefix("\n").removesuffix("\n")
    kind = schema.get("type") if isinstance(schema, dict) else None
    if kind == "string" or (isinstance(kind, list) and "string" in kind and text != "null"):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        words: dict[str, Any] = {"true": True, "false": False, "none": None}
        return words.get(text.strip().lower(), text)
