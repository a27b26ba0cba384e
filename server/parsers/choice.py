"""One choice of an answer: its text in, the fields of its deltas out."""

from collections.abc import Callable

from octavo.server.collect import Delta, ToolCall
from octavo.server.parsers.events import CallBegins, CallGoesOn, Event, Parser, Text, Thought
from octavo.server.parsers.harmony import Harmony
from octavo.server.parsers.reasoning import Thinking
from octavo.server.parsers.strip import Strip


class Choice:
    """Rewrites the deltas of one choice: thoughts and calls leave the text.

    White space beside a call is dropped; the rest of the text stays as it came.
    """

    def __init__(
        self,
        parser: Parser,
        thinking: Thinking | Harmony | None,
        strip: Strip | None,
        several: bool,
        new_id: Callable[[], str],
    ) -> None:
        """`parser` reads what `thinking` leaves; `several`: calls after the first count too."""
        self._parser, self._thinking, self._strip = parser, thinking, strip
        self._several, self._new_id = several, new_id
        self._space = ""  # white space that may be beside a call
        self._beside = False  # nothing but white space came since a call
        self._calls = 0
        self._answered = 0  # characters of the last text that are no thought
        self.reasoning_tokens = 0

    def rewrite(self, delta: Delta) -> None:
        """In place; nothing of the text is lost when the last delta has come."""
        ended, characters = delta.finish_reason is not None, len(delta.text)
        thought = self._thinks()
        events = self._read(delta.text, ended)
        delta.text = delta.reasoning = ""
        thought = thought or self._thinks()
        for event in events:
            match event:
                case Text(text):
                    self._say(delta, text)
                case Thought(text):
                    delta.reasoning += text
                    thought = True
                case CallBegins(name):
                    self._begin(delta, name)
                case CallGoesOn(arguments):
                    if self._counts():
                        delta.tool_calls.append(ToolCall(self._calls - 1, arguments=arguments))
        if thought:  # of what piled up with the answer's beginning, its part of the characters
            tokens, answered = len(delta.token_ids), min(self._answered, characters)
            self.reasoning_tokens += tokens - tokens * answered // max(1, characters)
        if ended:
            if self._strip is not None:
                self._say(delta, "", self._strip.finish())
            delta.text += self._space
            if self._calls and delta.finish_reason == "stop":
                delta.finish_reason = "tool_calls"

    def _thinks(self) -> bool:
        return self._thinking is not None and self._thinking.inside

    def _read(self, text: str, ended: bool) -> list[Event]:
        if self._thinking is None:
            return self._answer(text, ended)
        events = self._thinking.feed(text)
        if ended:
            events += self._thinking.finish()
        self._answered = sum(len(event.text) for event in events if isinstance(event, Text))
        out: list[Event] = []
        for event in events:
            out += self._answer(event.text, False) if isinstance(event, Text) else [event]
        return out + self._answer("", True) if ended else out

    def _answer(self, text: str, ended: bool) -> list[Event]:
        events = self._parser.feed(text) if text else []
        return events + self._parser.finish() if ended else events

    def _say(self, delta: Delta, text: str, rest: str = "") -> None:
        if self._strip is not None:
            text = self._strip.feed(text)
        text = self._space + text + rest
        if self._beside:
            text = text.lstrip()
        ready = text.rstrip()
        self._beside = self._beside and not ready
        delta.text += ready
        self._space = text[len(ready) :]

    def _begin(self, delta: Delta, name: str) -> None:
        self._space, self._beside = "", True
        self._calls += 1
        if self._counts():
            new = ToolCall(self._calls - 1, self._new_id(), name, "")
            delta.tool_calls.append(new)

    def _counts(self) -> bool:
        return self._several or self._calls == 1
