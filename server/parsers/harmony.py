"""The format of gpt-oss: messages of several channels in one text.

<|channel|>analysis<|message|>...<|end|>                                thoughts
<|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{...}<|call|>
<|start|>assistant<|channel|>final<|message|>...<|return|>              the answer
"""

import re

from octavo.server.parsers.events import (
    CallBegins,
    CallGoesOn,
    Event,
    Text,
    Thought,
    find_first,
    held,
)

MESSAGE = "<|message|>"
ENDS = ("<|end|>", "<|call|>", "<|return|>", "<|start|>")
STARTS = ("<|channel|>", "<|start|>")
_TO = re.compile(r"to=(?:functions\.)?([\w.-]+)")


class Harmony:
    """Thoughts, answers and calls. Text that is in no channel is the answer."""

    def __init__(self) -> None:
        self._buffer = ""
        self._kind = ""  # "header", "text", "thought", "call"; "" is not known yet

    @property
    def inside(self) -> bool:
        """The next text is a thought, as far as is known."""
        return self._kind == "thought"

    def feed(self, text: str) -> list[Event]:
        self._buffer += text
        events: list[Event] = []
        while self._step(events):
            pass
        return events

    def _step(self, events: list[Event]) -> bool:
        """One mark further; False when more text is needed."""
        if self._kind == "":
            start = self._buffer.lstrip()
            if start.startswith(STARTS):
                self._kind, self._buffer = "header", start
            elif any(mark.startswith(start) for mark in STARTS):
                return False
            else:
                self._kind = "text"
        marks = (MESSAGE,) if self._kind == "header" else ENDS
        at, mark = find_first(self._buffer, marks)
        if self._kind == "header":
            if at < 0:
                return False
            self._open(self._buffer[:at], events)
            self._buffer = self._buffer[at + len(mark) :]
            return True
        if at < 0:
            at = len(self._buffer) - held(self._buffer, marks)
        self._say(self._buffer[:at], events)
        self._buffer = self._buffer[at + len(mark) :]
        if mark:
            self._kind = "header" if mark == "<|start|>" else ""
        return bool(mark)

    def _open(self, header: str, events: list[Event]) -> None:
        to = _TO.search(header)
        if to is not None:
            self._kind = "call"
            events.append(CallBegins(to[1]))
        else:
            self._kind = "thought" if "analysis" in header else "text"

    def _say(self, text: str, events: list[Event]) -> None:
        if text:
            kinds: dict[str, type[Thought] | type[CallGoesOn] | type[Text]]
            kinds = {"thought": Thought, "call": CallGoesOn, "text": Text}
            events.append(kinds[self._kind](text))

    def finish(self) -> list[Event]:
        rest, self._buffer = self._buffer, ""
        events: list[Event] = []
        if rest:
            if self._kind in ("", "header"):
                self._kind = "text"
            self._say(rest, events)
        return events
