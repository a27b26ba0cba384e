"""Thoughts in front of an answer, between two marks: <think> ... </think>."""

from octavo.server.parsers.events import Event, Text, Thought, held

OPEN, CLOSE = "<think>", "</think>"


def leaves_open(prompt: str, mark: str = OPEN) -> bool:
    """The prompt itself ends with the mark that opens the thoughts."""
    return prompt.rstrip().endswith(mark)


def closes(prompt: str, mark: str = CLOSE) -> bool:
    """The prompt ends behind thoughts that it has opened and closed: none are wanted."""
    return prompt.rstrip().endswith(mark)


class Thinking:
    """`inside`: the text begins with thoughts, their opening mark was in the prompt or is left out.

    White space around the marks belongs to them.
    """

    def __init__(self, inside: bool) -> None:
        self._state = "inside" if inside else "before"
        self._buffer = ""
        self._bare = True  # nothing but white space since the last mark

    @property
    def inside(self) -> bool:
        """The next text is a thought, as far as is known."""
        return self._state == "inside"

    def feed(self, text: str) -> list[Event]:
        self._buffer += text
        events: list[Event] = []
        if self._state == "before":
            start = self._buffer.lstrip()
            if start.startswith(OPEN):
                self._state, self._buffer = "inside", start[len(OPEN) :]
            elif OPEN.startswith(start):
                return []  # white space, or half a mark
            else:
                self._state, self._bare = "after", False
        if self._state == "inside":
            if not self._inside(events):
                return events
        if self._state == "after":
            self._after(events)
        return events

    def _inside(self, events: list[Event]) -> bool:
        """Give out thoughts; whether they have ended."""
        buffer = self._buffer
        if self._bare:
            buffer = buffer.lstrip()
        if buffer.startswith(OPEN) and self._bare:  # opened in the prompt, and once more here
            buffer = buffer[len(OPEN) :].lstrip()
        elif self._bare and OPEN.startswith(buffer):
            return self._keep(buffer)
        at = buffer.find(CLOSE)
        if at >= 0:
            self._think(events, buffer[:at].rstrip())
            self._state, self._buffer, self._bare = "after", buffer[at + len(CLOSE) :], True
            return True
        keep = held(buffer, (CLOSE,))
        ready = buffer[: len(buffer) - keep].rstrip()  # white space may belong to the mark
        self._think(events, ready)
        return self._keep(buffer[len(ready) :])

    def _keep(self, buffer: str) -> bool:
        self._buffer = buffer
        return False

    def _think(self, events: list[Event], text: str) -> None:
        if text:
            events.append(Thought(text))
            self._bare = False

    def _after(self, events: list[Event]) -> None:
        text = self._buffer.lstrip() if self._bare else self._buffer
        self._buffer = ""
        if text:
            events.append(Text(text))
            self._bare = False

    def finish(self) -> list[Event]:
        rest, self._buffer = self._buffer, ""
        if not rest:
            return []
        return [Thought(rest)] if self._state == "inside" and not self._bare else [Text(rest)]
