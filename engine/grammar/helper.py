"""The helper process that compiles grammars for an API process: it can be ended, a thread cannot.

Frames on stdin and stdout: a length of 4 bytes, little-endian, then msgpack. The first frame is the
Vocabulary, answered by an empty one; every other is StructuredOutputsParams, answered by a Verdict.
"""

import contextlib
import os
import resource
import sys
from typing import IO

import msgspec

from octavo.engine.sampling_params import ParameterError, StructuredOutputsParams

NICE = 5  # the engine and the event loops come first
MEMORY = 4 << 30  # bytes of address space that compiling may add


class Verdict(msgspec.Struct, array_like=True):
    """A grammar's text, or what is wrong with it."""

    text: str = ""
    problem: str = ""


def read_frame(stream: IO[bytes]) -> bytes:
    """One frame; EOFError at the end."""
    head = stream.read(4)
    if len(head) < 4:
        raise EOFError
    size = int.from_bytes(head, "little")
    body = stream.read(size)
    if len(body) < size:
        raise EOFError
    return body


def write_frame(stream: IO[bytes], body: bytes) -> None:
    """One frame, flushed."""
    stream.write(len(body).to_bytes(4, "little") + body)
    stream.flush()


def main() -> None:
    """Answer until stdin ends."""
    from octavo.engine.grammar.guide import compile_grammar, try_first
    from octavo.engine.grammar.source import grammar_text
    from octavo.engine.grammar.vocabulary import Vocabulary

    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not get between the frames
    os.nice(NICE)
    with contextlib.suppress(EOFError, BrokenPipeError, KeyboardInterrupt):
        vocabulary = msgspec.msgpack.decode(read_frame(requests), type=Vocabulary)
        tokenizer = vocabulary.open()
        _limit_memory()
        write_frame(answers, b"")
        while True:
            params = msgspec.msgpack.decode(read_frame(requests), type=StructuredOutputsParams)
            verdict = Verdict()
            try:
                verdict.text = grammar_text(params)
                try_first(compile_grammar(tokenizer, verdict.text), vocabulary.size)
            except ParameterError as error:
                verdict = Verdict(problem=error.problem)
            except ValueError as error:
                verdict = Verdict(problem=f"cannot be used: {error}")
            except MemoryError:
                verdict = Verdict(problem="is too large: it ran out of memory")
            write_frame(answers, msgspec.msgpack.encode(verdict))


def _limit_memory() -> None:
    try:
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
    except OSError:  # not on Linux: the time limit has to do
        return
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
