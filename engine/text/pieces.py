"""What each token adds to a text, as a table.

For the two kinds of decoder that nearly all models have, a token always stands for the same bytes.
Text is then a lookup and, only where a character is split over tokens, a UTF-8 decoder: 0.3 us a
token where a window that is decoded again at each step costs 0.6 to 1 us, and what is pending at
the end of a sequence is known exactly.
"""

import json
import re
from typing import Any

from tokenizers import Tokenizer as Backend

SPACE = "\u2581"
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>$")


def _byte_level_alphabet() -> dict[str, int]:
    """Character -> byte of byte-level BPE: printable bytes are themselves, the rest follow 255."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    return table | {chr(256 + i): byte for i, byte in enumerate(others)}


class Pieces:
    """Bytes and text per token id, filled as they are asked for."""

    def __init__(self, backend: Backend, byte_level: bool) -> None:
        self._backend = backend
        self._alphabet = _byte_level_alphabet() if byte_level else None
        # str where a token is whole characters, bytes where it may be part of one, None: not yet
        self.table: list[str | bytes | None] = [None] * (
            max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        )

    @classmethod
    def of(cls, backend: Backend) -> "Pieces | None":
        """The table of this tokenizer, or None if its decoder looks at more than one token."""
        if backend.decoder is None:
            return None
        state: dict[str, Any] = json.loads(backend.decoder.__getstate__())
        if state["type"] == "ByteLevel":
            return cls(backend, byte_level=True)
        if state["type"] == "Sequence":
            kinds = [step["type"] for step in state["decoders"]]
            replace = state["decoders"][0]
            known = kinds[:3] == ["Replace", "ByteFallback", "Fuse"] and (
                # A strip at the left of the whole text never touches what follows a prompt.
                kinds[3:] == [] or (kinds[3:] == ["Strip"] and state["decoders"][3]["stop"] == 0)
            )
            if known and replace["pattern"] == {"String": SPACE} and replace["content"] == " ":
                return cls(backend, byte_level=False)
        return None

    def look(self, token: int) -> str | bytes:
        """The table's entry, made if it was not there. Ids without a token are empty."""
        if not 0 <= token < len(self.table):
            return ""
        piece = self.table[token]
        if piece is None:
            raw = self._bytes_of(self._backend.id_to_token(token) or "")
            try:
                piece = raw.decode()
            except UnicodeDecodeError:
                piece = raw
            self.table[token] = piece
        return piece

    def text(self, token: int) -> str:
        """One token alone; U+FFFD where it is part of a character."""
        piece = self.look(token)
        return piece if isinstance(piece, str) else piece.decode(errors="replace")

    def raw(self, token: int) -> bytes:
        """One token alone."""
        piece = self.look(token)
        return piece.encode() if isinstance(piece, str) else piece

    def _bytes_of(self, token: str) -> bytes:
        if self._alphabet is not None:
            try:
                return bytes(self._alphabet[char] for char in token)
            except KeyError:  # an added token is its own text
                return token.encode()
        if match := _BYTE.match(token):
            return bytes([int(match[1], 16)])
        return token.replace(SPACE, " ").encode()
