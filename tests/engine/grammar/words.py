"""A vocabulary of the tiny engine's size, and grammars over it that brute force can check."""

import json
from collections.abc import Iterable

import numpy as np

from octavo.engine.grammar.vocabulary import Vocabulary
from tests.engine.tiny import EOS, VOCAB

# Single characters, then pieces of several that overlap in every way.
SINGLE = 'abc{}":,0123456789 .-'
PIECES = [*SINGLE, "ab", "ba", "abc", "aa", "bb", "cab", '{"', '":', '"a"', "10", "}}"]


def make_vocabulary() -> Vocabulary:
    """VOCAB tokens; those that no piece is left for are empty, as a padded model has them."""
    tokens = [b""] * VOCAB
    pieces = iter(PIECES)
    for i in range(6, VOCAB):
        if i not in EOS:
            tokens[i] = next(pieces, "").encode()
    for end in EOS:
        tokens[end] = f"<end{end}>".encode()
    return Vocabulary(VOCAB, EOS, EOS, tokens=tokens)


VOCABULARY = make_vocabulary()


def words_grammar(words: Iterable[str]) -> str:
    """Any of these words; every way to spell one in tokens is allowed."""
    start = " | ".join(json.dumps(word) for word in words)
    return '%llguidance {"no_forcing": true}\nstart: ' + start


def text_of(tokens: Iterable[int]) -> str:
    return b"".join(VOCABULARY.tokens[t] for t in tokens if t not in EOS).decode()


def brute_force(words: Iterable[str], said: str) -> set[int]:
    """The tokens after which `said` can still become one of the words, and ends where it is one."""
    words = list(words)
    allowed = {
        i
        for i, token in enumerate(VOCABULARY.tokens)
        if token and i not in EOS and any(w.startswith(said + token.decode()) for w in words)
    }
    return allowed | (set(EOS) if said in words else set())


def allowed(mask: np.ndarray) -> set[int]:
    """The tokens of a mask row u32[words]."""
    bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
    return set(np.flatnonzero(bits[:VOCAB]).tolist())
