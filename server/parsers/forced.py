"""Calls that the grammar of the request forces: the text is JSON of a known form."""

from octavo.server.parsers.events import CallBegins, CallGoesOn, Event, Text
from octavo.server.parsers.tagged import read_json_calls


class Named:
    """All of the text is the arguments of one tool."""

    def __init__(self, name: str) -> None:
        self._name, self._begun = name, False

    def feed(self, text: str) -> list[Event]:
        if not text:
            return []
        events: list[Event] = [] if self._begun else [CallBegins(self._name)]
        self._begun = True
        return [*events, CallGoesOn(text)]

    def finish(self) -> list[Event]:
        return []


class Required:
    """A JSON list of calls; each is given out when its object is whole."""

    def __init__(self) -> None:
        self._buffer, self._around = "", ""
        self._depth, self._string, self._escaped = 0, False, False
        self._called = False

    def feed(self, text: str) -> list[Event]:
        events: list[Event] = []
        for character in text:
            if self._depth == 0:
                if character == "{":
                    self._buffer, self._depth = character, 1
                elif character.isspace() or character in "[],":
                    self._around += character
                else:
                    events.append(Text(self._around + character))  # no JSON: no grammar ruled
                    self._around = ""
                continue
            self._buffer += character
            if self._count(character):
                found = read_json_calls(self._buffer)
                events += [Text(self._around + self._buffer)] if found is None else found
                self._called = self._called or found is not None
                self._buffer = self._around = ""
        return events

    def _count(self, character: str) -> bool:
        """Whether the object ends with this character."""
        if self._escaped:
            self._escaped = False
        elif self._string:
            self._escaped = character == "\\"
            self._string = character != '"'
        elif character == '"':
            self._string = True
        elif character in "{}":
            self._depth += 1 if character == "{" else -1
        return self._depth == 0

    def finish(self) -> list[Event]:
        if self._called and not self._buffer:
            return []  # the end of the list
        rest, self._buffer, self._around = self._around + self._buffer, "", ""
        return [Text(rest)] if rest else []
