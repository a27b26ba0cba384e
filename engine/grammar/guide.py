"""Guides: where each sequence is in its grammar, and the masks of many sequences at once."""

import os
from collections.abc import Iterable

import numpy as np
from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer

from octavo.engine.grammar.source import first_line

# llguidance bounds the work of a compilation and of each mask by itself; its messages must not
# show what else is in the matcher.
TRIED = 4  # tokens of a text that a new grammar is tried with
LIMITS = LLParserLimits(verbose_errors=False)


def compile_grammar(tokenizer: LLTokenizer, text: str) -> LLMatcher:
    """A matcher at the beginning of its grammar. Raises ValueError, one line, where it is wrong."""
    matcher = LLMatcher(tokenizer, text, log_level=0, limits=LIMITS)
    if matcher.is_error():
        raise ValueError(first_line(matcher.get_error()))
    return matcher


def try_first(matcher: LLMatcher, size: int) -> None:
    """Raises ValueError where not even the first tokens of a text can be chosen."""
    matcher = matcher.deep_copy()
    words = np.zeros(mask_words(size), np.uint32)
    for _ in range(TRIED):
        matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        if matcher.is_error() or not words.any():
            raise ValueError(reason(matcher) or "no text can have this form")
        word = int(np.argmax(words != 0))
        lowest = int(words[word]) & -int(words[word])
        matcher.consume_token(32 * word + lowest.bit_length() - 1)
        if matcher.is_error():
            raise ValueError(reason(matcher))
        if matcher.is_stopped():
            return


def reason(matcher: LLMatcher) -> str:
    """Why a matcher cannot go on."""
    line = first_line(matcher.get_error())
    return "no text can have this form" if line.startswith("NoExtension") else line


def mask_words(vocab: int) -> int:
    """Words of one row's mask."""
    return -(-vocab // 32)


class Guide:
    """One sequence's place in its grammar; follows from the tokens of its output alone."""

    def __init__(self, matcher: LLMatcher, ends: Iterable[int], after: Iterable[int] = ()) -> None:
        """`after`: the grammar begins behind the first place where these stand in the output."""
        self.matcher = matcher
        self.ends = frozenset(ends)  # tokens that end a text where the grammar allows an end
        self.over = False  # it ended, and was told to go on: nothing but ends may follow
        self.broken = ""  # why no token can be chosen any more
        self._after = list(after)
        self._at = 0  # output tokens that were looked at

    @property
    def begun(self) -> bool:
        """Whether the grammar rules the next token."""
        return not self._after

    def advance(self, output: np.ndarray) -> None:
        """Take in the tokens that are new in `output`, i32[n], all that the sequence said."""
        tokens = output[self._at :].tolist()
        if self._after:
            tokens = self._wait(output)
        else:
            self._at = len(output)
        for token in tokens:
            self.over = self.over or token in self.ends
            if self.over or self.broken:
                return
            if not self.matcher.consume_token(token):
                self.broken = reason(self.matcher) or f"token {token} does not fit the grammar"

    def _wait(self, output: np.ndarray) -> list[int]:
        """Look for the marker; the tokens behind it, once it is there."""
        count = len(self._after)
        for at in range(max(0, self._at - count + 1), len(output) - count + 1):
            if output[at : at + count].tolist() == self._after:
                self._after = []
                self._at = len(output)
                return output[at + count :].tolist()
        self._at = len(output)
        return []


class Filler:
    """Fills the masks of many guides in parallel, outside of the interpreter's lock."""

    def __init__(self, vocab: int) -> None:
        self._vocab = vocab
        self._executor: LLExecutor | None = None

    def fill(self, guides: list[Guide]) -> np.ndarray:
        """u32[len(guides), words]: bit v allows token v. One that cannot go on says `broken`."""
        out = np.full((len(guides), mask_words(self._vocab)), 0xFFFFFFFF, np.uint32)
        jobs = []
        for i, guide in enumerate(guides):
            if guide.over:
                out[i] = 0
                _allow(out[i], guide.ends)
            elif guide.begun and not guide.broken:
                jobs.append((guide.matcher, i))
        if not jobs:
            return out
        if self._executor is None:
            self._executor = LLExecutor(min(32, len(os.sched_getaffinity(0))))
        words = out.shape[1]
        self._executor.unsafe_compute_mask_ptr(jobs, out.ctypes.data, 4 * words, len(guides))
        for matcher, i in jobs:
            if matcher.is_error():  # its mask would be that of an end: the text is none
                guides[i].broken = reason(matcher)
                continue
            row = out[i]
            if any(row[end >> 5] >> (end & 31) & 1 for end in guides[i].ends):
                _allow(row, guides[i].ends)
        return out


def _allow(row: np.ndarray, tokens: Iterable[int]) -> None:
    for token in tokens:
        row[token >> 5] |= np.uint32(1 << (token & 31))
