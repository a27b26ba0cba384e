"""Checker: in an API process, says whether a grammar can be served, within a time limit.

Compiling runs in helper processes, because nothing else can be ended: a schema that is too slow, or
that takes a helper down, costs its own request alone. A few helpers share the work, and at least
one of them never does anything slow.
"""

import asyncio
import hashlib
import json
import os
import select
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import msgspec

from octavo.engine.grammar.helper import Verdict, read_frame, write_frame
from octavo.engine.grammar.source import FIELD, check_size
from octavo.engine.grammar.vocabulary import Vocabulary
from octavo.engine.sampling_params import ParameterError, StructuredOutputsParams

HELPERS = 3
SLOW = HELPERS - 1  # of them may be at something that takes longer than QUICK
QUICK = 0.5  # seconds
START = 60.0  # seconds that a helper may take until it is ready
KEPT = 128  # grammars whose verdict is remembered


class Checker:
    """Grammar texts of requests, checked. Safe to share between threads."""

    def __init__(self, vocabulary: Callable[[], Vocabulary], time_limit: float) -> None:
        """`vocabulary` is called once, when it is first needed; it may raise ParameterError."""
        self._vocabulary = vocabulary
        self._frame: bytes | None = None  # the vocabulary, encoded
        self._limit = time_limit
        self._threads = ThreadPoolExecutor(HELPERS, thread_name_prefix="octavo-grammar")
        self._idle: list[_Helper] = []
        self._slow = threading.Semaphore(SLOW)
        self._lock = threading.Lock()
        self._reading = threading.Lock()
        self._verdicts: OrderedDict[bytes, Future[Verdict]] = OrderedDict()
        self._closed = False

    def check(self, params: StructuredOutputsParams) -> str:
        """The grammar's text for the engine; blocks. Raises ParameterError within the limit."""
        return _text(self._verdict(params).result())

    async def acheck(self, params: StructuredOutputsParams) -> str:
        """As `check`, while the event loop goes on."""
        return _text(await asyncio.shield(asyncio.wrap_future(self._verdict(params))))

    def close(self) -> None:
        """End the helpers."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for helper in idle:
            helper.end()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _verdict(self, params: StructuredOutputsParams) -> "Future[Verdict]":
        """The same grammar is compiled once, however many ask for it."""
        check_size(params)
        if isinstance(params.json, dict):  # JSON has integers that msgpack has not
            params = msgspec.structs.replace(params, json=json.dumps(params.json))
        frame = msgspec.msgpack.encode(params)
        key = hashlib.sha256(frame).digest()
        with self._lock:
            future = self._verdicts.get(key)
            if future is None or _failed(future):
                future = self._verdicts[key] = self._threads.submit(self._compile, frame)
                while len(self._verdicts) > KEPT:
                    self._verdicts.popitem(last=False)
            self._verdicts.move_to_end(key)
        return future

    def _compile(self, frame: bytes) -> Verdict:
        helper = self._take()
        try:
            verdict = helper.ask(frame, min(QUICK, self._limit))
            if verdict is None and self._limit > QUICK:
                verdict = self._wait_longer(helper)
        except (OSError, EOFError):  # it ran out of memory or of stack
            helper.end()
            return Verdict(problem="is too large: compiling it ended the process that did")
        except BaseException:
            helper.end()
            raise
        if verdict is None:
            helper.end()
            return Verdict(
                problem=f"takes longer than {self._limit:g} s to compile, the limit of "
                "--grammar-time-limit: make it simpler"
            )
        with self._lock:
            if not self._closed:
                self._idle.append(helper)
                return verdict
        helper.end()
        return verdict

    def _wait_longer(self, helper: "_Helper") -> Verdict | None:
        if not self._slow.acquire(blocking=False):
            raise ParameterError(
                FIELD,
                f"takes longer than {QUICK:g} s to compile while others do too: try again later",
            )
        try:
            return helper.wait(self._limit - QUICK)
        finally:
            self._slow.release()

    def _take(self) -> "_Helper":
        with self._lock:
            if self._idle:
                return self._idle.pop()
        with self._reading:  # takes a moment, in which others may ask for verdicts
            if self._frame is None:
                self._frame = msgspec.msgpack.encode(self._vocabulary())
        return _Helper(self._frame)


class _Helper:
    """One helper process."""

    def __init__(self, vocabulary: bytes) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from octavo.engine.grammar.helper import main; main()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._in, self._out = self._process.stdin, self._process.stdout
        try:
            write_frame(self._in, vocabulary)
            if not self._readable(START):
                raise OSError("the helper process does not start")
            read_frame(self._out)
        except BaseException:
            self.end()
            raise

    def ask(self, frame: bytes, seconds: float) -> Verdict | None:
        """The verdict, or None after that time: `wait` for it, or end the helper."""
        write_frame(self._in, frame)
        return self.wait(seconds)

    def wait(self, seconds: float) -> Verdict | None:
        if not self._readable(seconds):
            return None
        return msgspec.msgpack.decode(read_frame(self._out), type=Verdict)

    def _readable(self, seconds: float) -> bool:
        poll = select.poll()  # not `select`, which takes no descriptor above 1023
        poll.register(self._out, select.POLLIN)
        return bool(poll.poll(1000 * seconds))

    def end(self) -> None:
        """Now, whatever it does."""
        self._process.kill()
        self._process.wait()
        for stream in (self._in, self._out):
            try:
                stream.close()
            except OSError:  # what was not written has nobody to read it
                pass


def _text(verdict: Verdict) -> str:
    if verdict.problem:
        raise ParameterError(FIELD, verdict.problem)
    return verdict.text


def _failed(future: "Future[Verdict]") -> bool:
    """Whether there is no verdict: that says nothing of the grammar, so the next may try again."""
    return future.done() and (future.cancelled() or future.exception() is not None)
