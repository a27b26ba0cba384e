"""What a grammar must know of a model's tokens; crosses to the helper process as one message."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec
from llguidance import LLTokenizer, TokenizerWrapper

from octavo.engine.sampling_params import ParameterError

if TYPE_CHECKING:  # a helper process starts faster without it
    from octavo.engine.text.tokenizer import Tokenizer


class Vocabulary(msgspec.Struct, frozen=True):
    """The tokens by id: as a tokenizer.json where it says all, else as the bytes of each."""

    size: int  # V: of the logits, which may be more than the tokenizer knows
    ends: list[int]  # tokens that end a text
    special: list[int]
    file: str = ""  # tokenizer.json
    tokens: list[bytes] = []

    @classmethod
    def of(cls, tokenizer: Tokenizer | None, size: int, ends: Sequence[int]) -> Vocabulary:
        """The vocabulary of a model. Raises ParameterError where no grammar can work with it."""
        if tokenizer is None:
            raise ParameterError("structured_outputs", "needs a tokenizer, and this model has none")
        own = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
        inside = [end for end in dict.fromkeys([*ends, *own]) if 0 <= end < size]
        if not inside:
            raise ParameterError(
                "structured_outputs",
                "needs a model with an end-of-sequence token, and this one names none",
            )
        special = sorted(i for i in tokenizer.special_ids if i < size)
        # llguidance reads the two usual kinds of decoder; it must never see more ids than V.
        if tokenizer.pieces is not None and tokenizer.vocab_size <= size:
            return cls(size, inside, special, file=tokenizer.backend.to_str())
        tokens = [tokenizer.token_bytes(i) for i in range(min(tokenizer.vocab_size, size))]
        tokens += [b""] * (size - len(tokens))
        return cls(size, inside, special, tokens=tokens)

    def open(self) -> LLTokenizer:
        """What llguidance compiles against; 0.2 s for 49,000 tokens."""
        if self.file:
            return LLTokenizer(self.file, n_vocab=self.size, eos_token=self.ends)
        wrapper = TokenizerWrapper(_Longest(self.tokens, self.ends[0], self.special))
        return LLTokenizer(wrapper, n_vocab=self.size, eos_token=self.ends)


class _Longest:
    """A tokenizer that takes the longest token at each place."""

    def __init__(self, tokens: list[bytes], end: int, special: list[int]) -> None:
        self.tokens = tokens
        self.eos_token_id, self.bos_token_id = end, None
        self.special_token_ids = special
        hidden = set(special)
        self._ids = {t: i for i, t in enumerate(tokens) if t and i not in hidden}
        self._longest = max(map(len, self._ids), default=1)

    def __call__(self, text: bytes | str) -> list[int]:
        raw = text.encode() if isinstance(text, str) else text
        ids, at = [], 0
        while at < len(raw):
            for length in range(min(self._longest, len(raw) - at), 0, -1):
                if (token := self._ids.get(raw[at : at + length])) is not None:
                    ids.append(token)
                    at += length
                    break
            else:
                at += 1  # no token has this byte: nothing can be forced through it
        return ids
