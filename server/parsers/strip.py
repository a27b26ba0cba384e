"""Takes special tokens out of a text that had to keep them for another parser's sake."""

import re
from collections.abc import Iterable

from octavo.server.parsers.events import held


class Strip:
    """Removes marks from pieces of text; half a mark is held back."""

    def __init__(self, marks: Iterable[str]) -> None:
        self._marks = tuple(sorted(filter(None, marks), key=len, reverse=True))
        self._pattern = re.compile("|".join(map(re.escape, self._marks)))
        self._buffer = ""

    def feed(self, text: str) -> str:
        if not self._marks:
            return text
        *before, text = self._pattern.split(self._buffer + text)
        at = len(text) - held(text, self._marks)  # what a removed mark parted makes no new one
        self._buffer = text[at:]
        return "".join(before) + text[:at]

    def finish(self) -> str:
        rest, self._buffer = self._buffer, ""
        return rest
