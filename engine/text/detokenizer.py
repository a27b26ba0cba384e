"""Tokens to text as they come, and stop strings wherever they cross token borders.

    tokens -> bytes -> whole characters -> [held back] -> released
                                            at most the longest stop string less one character

The text of a sequence is what it adds to its prompt: the deltas of a stream, put together, are the
text at its end, character for character.
"""

import codecs
from collections.abc import Iterable, Sequence
from typing import Protocol

from tokenizers.decoders import DecodeStream

from octavo.engine.text.tokenizer import Tokenizer

_UTF8 = codecs.getincrementaldecoder("utf-8")
PROMPT_TAIL = 8  # tokens of the prompt that tell a context-dependent decoder where it is


class _Decoder(Protocol):
    def push(self, tokens: Iterable[int]) -> str: ...

    def end(self) -> str: ...


class _TableDecoder:
    """Looks tokens up; a UTF-8 decoder joins the characters that tokens split."""

    __slots__ = ("_pieces", "_table", "_skip", "_partial")

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        assert tokenizer.pieces is not None
        self._pieces = tokenizer.pieces
        self._table = tokenizer.pieces.table
        self._skip = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._partial: codecs.IncrementalDecoder | None = None  # set inside a split character

    def push(self, tokens: Iterable[int]) -> str:
        text = ""
        table, skip, partial = self._table, self._skip, self._partial
        for token in tokens:
            if token in skip:
                continue
            try:
                piece = table[token]
            except IndexError:  # a padded vocabulary has ids without a token
                continue
            if piece is None:
                piece = self._pieces.look(token)
            if partial is None:
                if isinstance(piece, str):
                    text += piece
                    continue
                partial = _UTF8("replace")
            raw = piece if isinstance(piece, bytes) else piece.encode()
            text += partial.decode(raw)
            if not partial.getstate()[0]:
                partial = None
        self._partial = partial
        return text

    def end(self) -> str:
        partial, self._partial = self._partial, None
        return "" if partial is None else partial.decode(b"", True)


class _StreamDecoder:
    """Any other tokenizer, through its own decoder, which may look at neighbours."""

    __slots__ = ("_backend", "_stream", "_tokenizer", "_skip", "_pending")

    def __init__(
        self, tokenizer: Tokenizer, skip_special_tokens: bool, prompt: Sequence[int]
    ) -> None:
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend
        self._skip = skip_special_tokens
        self._stream = DecodeStream(
            ids=list(prompt[-PROMPT_TAIL:]), skip_special_tokens=skip_special_tokens
        )
        self._pending: list[int] = []

    def push(self, tokens: Iterable[int]) -> str:
        text = ""
        for token in tokens:
            piece = self._stream.step(self._backend, token)
            if piece is None:
                self._pending.append(token)
            else:
                self._pending.clear()
                text += piece
        return text

    def end(self) -> str:
        pending, self._pending = self._pending, []
        return self._tokenizer.decode(pending, self._skip) if pending else ""


class Detokenizer:
    """One sequence's text: feed it with `push`, close it with `end`, read it with `take`."""

    __slots__ = ("_decoder", "_stops", "_hold", "_held", "_released", "_include_stop")

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        skip_special_tokens: bool = True,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        prompt: Sequence[int] = (),
    ) -> None:
        self._decoder: _Decoder = (
            _TableDecoder(tokenizer, skip_special_tokens)
            if tokenizer.pieces is not None
            else _StreamDecoder(tokenizer, skip_special_tokens, prompt)
        )
        self._stops = tuple(stop)
        self._hold = max(map(len, self._stops), default=1) - 1
        self._include_stop = include_stop
        self._held = ""  # decoded, and perhaps the beginning of a stop string
        self._released: list[str] = []

    def push(self, tokens: Iterable[int], look_for_stops: bool = True) -> str | None:
        """Add tokens. Returns the stop string that they completed; the text then ends there."""
        new = self._decoder.push(tokens)
        if not self._stops:
            if new:
                self._released.append(new)
            return None
        return self._release(new, look_for_stops)

    def end(self, look_for_stops: bool = True) -> str | None:
        """No more tokens: release what was held back. A character cut short becomes U+FFFD."""
        new = self._decoder.end()
        found = self._release(new, look_for_stops) if self._stops and new else None
        if found is None and (rest := self._held if self._stops else new):
            self._released.append(rest)
        self._held = ""
        return found

    def take(self) -> str:
        """What was released since the last take."""
        released = self._released
        if len(released) == 1:
            text = released[0]
        else:
            text = "".join(released)
        released.clear()
        return text

    @property
    def text(self) -> str:
        """All that was released and not taken."""
        if len(self._released) > 1:
            self._released[:] = ["".join(self._released)]
        return self._released[0] if self._released else ""

    def _release(self, new: str, look_for_stops: bool) -> str | None:
        window = self._held + new
        if look_for_stops and new:
            first, found = len(window), None
            for stop in self._stops:
                # A stop string that was whole before these tokens came had its chance.
                at = window.find(stop, max(0, len(self._held) - len(stop) + 1))
                if at >= 0 and at < first:
                    first, found = at, stop
            if found is not None:
                self._held = ""
                self._released.append(window[: first + len(found) * self._include_stop])
                return found
        free = len(window) - self._hold
        if free > 0:
            self._released.append(window[:free])
            self._held = window[free:]
        else:
            self._held = window
        return None
