"""What a parser finds in a text, in order, and what every parser is."""

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Text:
    """Part of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class Thought:
    """Part of what was thought before the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegins:
    """A tool is called; its arguments follow."""

    name: str


@dataclass(frozen=True, slots=True)
class CallGoesOn:
    """The next part of the JSON text of the last call's arguments."""

    arguments: str


Event = Text | Thought | CallBegins | CallGoesOn


class Parser(Protocol):
    """Reads one choice. However the text is cut into pieces, the events say the same; all of the
    text is in them, except the marks that a parser knows."""

    def feed(self, text: str) -> list[Event]:
        """What is certain after this piece."""
        ...

    def finish(self) -> list[Event]:
        """What was held back, once no more text comes."""
        ...


def call(name: str, arguments: str) -> list[Event]:
    """A whole call."""
    return [CallBegins(name), CallGoesOn(arguments)]


def held(text: str, marks: tuple[str, ...]) -> int:
    """How many characters at the end of `text` may be the beginning of a mark."""
    longest = min(len(text), max(map(len, marks)) - 1)
    for n in range(longest, 0, -1):
        tail = text[-n:]
        if any(mark.startswith(tail) for mark in marks):
            return n
    return 0


def find_first(text: str, marks: tuple[str, ...]) -> tuple[int, str]:
    """Where the first mark begins, and which it is; -1 where there is none."""
    found = [(at, mark) for mark in marks if (at := text.find(mark)) >= 0]
    return min(found) if found else (-1, "")


class Plain:
    """Everything is the answer."""

    def feed(self, text: str) -> list[Event]:
        return [Text(text)] if text else []

    def finish(self) -> list[Event]:
        return []
