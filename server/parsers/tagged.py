"""Calls between two marks, <tool_call> ... </tool_call>: as JSON or as tags of their own."""

import re
from collections.abc import Callable
from typing import Any

from octavo.server.parsers.events import Event, Text, call, held
from octavo.server.parsers.values import decode_at, encode, encode_object, typed

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
        self._strings = Strings()

    def feed(self, text: str) -> list[Event]:
        self._buffer += text
        events: list[Event] = []
        while True:
            mark = CLOSE if self._inside else OPEN
            at = self._end() if self._inside else self._buffer.find(mark)
            if at < 0:
                break
            part, self._buffer = self._buffer[:at], self._buffer[at + len(mark) :]
            self._strings = Strings()
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
        while (at := self._buffer.find(CLOSE, self._strings.at)) >= 0:
            if not self._strings.inside(self._buffer, at):
                return at
            self._strings.inside(self._buffer, at + len(CLOSE))
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


class Strings:
    """Where the strings of growing JSON text are; every character is looked at once."""

    def __init__(self) -> None:
        self.at = 0  # characters looked at
        self._json: bool | None = None  # None: not known yet
        self._inside = self._escaped = False

    def inside(self, text: str, at: int) -> bool:
        """Whether `at`, which never goes back, is inside a string; never in text that is no JSON"""
        if self._json is None:
            self._json = text[:at].lstrip().startswith(("{", "["))
        if self._json:
            for character in text[self.at : at]:
                if self._escaped:
                    self._escaped = False
                elif character == "\\":
                    self._escaped = self._inside
                elif character == '"':
                    self._inside = not self._inside
        self.at = max(self.at, at)
        return self._inside


def read_json_calls(text: str, bare: bool = False) -> list[Event] | None:
    """{"name": ..., "arguments": {...}}, or several of them; None where it is anything else.

    `bare`: no mark says that it is a call, so that one without arguments is an answer in JSON.
    """
    events: list[Event] = []
    at, text = 0, text.strip()
    while at < len(text):
        try:
            value, at = decode_at(text, at)
        except (ValueError, RecursionError):
            return None
        found = calls_of(value, bare)
        if found is None:
            return None
        events += found
        while at < len(text) and (text[at].isspace() or text[at] in ";,"):
            at += 1
    return events or None


def calls_of(value: Any, bare: bool = False) -> list[Event] | None:
    """The calls in a decoded object or list of objects; None where one is no call."""
    if isinstance(value, list):
        parts = [calls_of(item, bare) for item in value]
        if not parts or any(part is None for part in parts):
            return None
        return [event for part in parts for event in part or ()]
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not value["name"]:
        return None
    if bare and not {"arguments", "parameters"} & value.keys():
        return None
    try:
        value["name"].encode()  # half of a pair of surrogates cannot be sent
        return call(
            value["name"], encode_object(value.get("arguments", value.get("parameters", {})))
        )
    except (ValueError, RecursionError):
        return None


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
            if _PARAMETER.sub("", found[2]).strip():
                return None  # text that no parameter holds
            properties = schemas.get(found[1], {}).get("properties")
            known = properties if isinstance(properties, dict) else {}
            arguments = {
                key: typed(value.removeprefix("\n").removesuffix("\n"), known.get(key))
                for key, value in _PARAMETER.findall(found[2])
            }
            events += call(found[1], encode(arguments))
            at = found.end()
        return events or None

    return read
