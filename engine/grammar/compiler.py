"""Compiler: in the engine, builds the matchers of requests on threads, beside the running batch.

Everything that arrives was compiled before, in a helper process of the client, so it is quick; the
threads are there for what is merely not slow. The interpreter's lock is free meanwhile.
"""

from __future__ import annotations

import logging
import queue
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llguidance import LLMatcher, LLTokenizer

from octavo.engine.grammar.guide import Guide, compile_grammar
from octavo.engine.grammar.vocabulary import Vocabulary

if TYPE_CHECKING:  # it brings jax
    from octavo.engine.sequence import Sequence

logger = logging.getLogger(__name__)

THREADS = 2
KEPT = 64  # matchers that are kept to be copied
COPIES = 64  # of one matcher: copies share what the lexer learns, and that has a limit of its own


@dataclass
class Compiled:
    """The sequences of one request, and why they cannot start, if they cannot."""

    sequences: list[Sequence]
    problem: str = ""


class Compiler:
    """Gives sequences their guides."""

    def __init__(self, vocabulary: Callable[[], Vocabulary] | None) -> None:
        """`vocabulary` reads the model's tokens; None: no request may ask for a form."""
        self._vocabulary = vocabulary
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="octavo-grammar")
        self._opened: Future[tuple[LLTokenizer, Vocabulary]] | None = None
        self._done: queue.SimpleQueue[Compiled] = queue.SimpleQueue()
        self._kept: OrderedDict[str, tuple[LLMatcher, int]] = OrderedDict()

    def warm(self) -> None:
        """Begin to read the vocabulary, so that the first request need not wait for it."""
        if self._vocabulary is not None and self._opened is None:
            self._opened = self._threads.submit(self._open)

    def submit(self, sequences: list[Sequence]) -> bool:
        """Compile the grammar of one request's sequences. True: they have their guides already."""
        text = sequences[0].request.grammar
        self.warm()
        if text in self._kept and self._opened is not None and self._opened.done():
            matcher, copies = self._kept.pop(text)
            copies += len(sequences)
            if copies <= COPIES:
                self._kept[text] = matcher, copies
            self._give(sequences, matcher)
            return True
        self._threads.submit(self._compile, text, sequences)
        return False

    def take(self, wait: float = 0.0) -> list[Compiled]:
        """What is done by now; waits up to `wait` seconds for the first."""
        out: list[Compiled] = []
        try:
            while True:
                got = self._done.get(block=wait > 0, timeout=wait or None)
                out.append(got)
                wait = 0.0
        except queue.Empty:
            return out

    def close(self) -> None:
        """Stop the threads; what they build is dropped."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _open(self) -> tuple[LLTokenizer, Vocabulary]:
        assert self._vocabulary is not None
        vocabulary = self._vocabulary()
        return vocabulary.open(), vocabulary

    def _compile(self, text: str, sequences: list[Sequence]) -> None:
        problem = ""
        try:
            if self._opened is None:
                raise ValueError("this engine has no tokenizer")
            matcher = compile_grammar(self._opened.result()[0], text)
            self._give(sequences, matcher)
            self._kept[text] = matcher, len(sequences)
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        except ValueError as error:
            problem = f"`structured_outputs` cannot be used: {error}"
        except Exception as error:  # whatever it is, it is this request's alone
            logger.exception("a grammar could not be compiled")
            problem = f"`structured_outputs` cannot be used: {type(error).__name__}"
        self._done.put(Compiled(sequences, problem))

    def _give(self, sequences: list[Sequence], matcher: LLMatcher) -> None:
        assert self._opened is not None
        vocabulary = self._opened.result()[1]
        special = set(vocabulary.special)
        for sequence in sequences:
            # A stop token of the request's own that is no text ends where an end may be; one that
            # is text comes where the grammar has it.
            ends = [*vocabulary.ends, *(t for t in sequence.stop_ids if t in special)]
            sequence.guide = Guide(matcher.deep_copy(), ends, sequence.request.mask_after)
