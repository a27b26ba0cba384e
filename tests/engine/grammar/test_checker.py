"""The checker: verdicts within the time limit, whatever a helper process goes through."""

import asyncio
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from octavo.engine.grammar.checker import SLOW, Checker
from octavo.engine.grammar.vocabulary import Vocabulary
from octavo.engine.sampling_params import ParameterError, StructuredOutputsParams
from tests.server.test_structured import slow

BYTES = Vocabulary(257, [256], [256], tokens=[*(bytes([i]) for i in range(256)), b"<end>"])


def form(**kind: Any) -> StructuredOutputsParams:
    return StructuredOutputsParams(**kind)


@pytest.fixture(scope="module")
def checker() -> Iterator[Checker]:
    made = Checker(lambda: BYTES, 1.0)
    made.check(form(regex="a"))
    yield made
    made.close()


def helpers(checker: Checker) -> list[int]:
    return [helper._process.pid for helper in checker._idle]


def test_a_good_form_gives_the_text_and_a_bad_one_the_reason(checker: Checker) -> None:
    assert checker.check(form(choice=["a", "b"])) == 'start: "a" | "b"'
    for _ in range(2):  # the second from memory
        with pytest.raises(ParameterError, match="unclosed group"):
            checker.check(form(regex="(a"))


def test_no_text_at_all_is_refused(checker: Checker) -> None:
    with pytest.raises(ParameterError, match="no text can have this form"):
        checker.check(form(json={"$ref": "#"}))


def test_what_would_fail_at_its_first_tokens_is_refused(checker: Checker) -> None:
    names = {f"k{i}": {"type": "string"} for i in range(1500)}
    with pytest.raises(ParameterError, match="max is 2000"):
        checker.check(form(json={"type": "object", "properties": names}))


def test_what_is_too_slow_is_ended_in_time_and_the_next_goes_on(checker: Checker) -> None:
    before = helpers(checker)
    began = time.monotonic()
    with pytest.raises(ParameterError, match="takes longer than 1 s to compile"):
        checker.check(form(json=slow()))
    assert 0.9 < time.monotonic() - began < 10.0
    with pytest.raises(ProcessLookupError):
        os.kill(before[-1], 0)
    assert checker.check(form(regex="ab"))


def test_a_helper_that_is_killed_costs_its_own_request_alone(checker: Checker) -> None:
    checker.check(form(regex="abc"))
    [victim] = helpers(checker)[-1:]
    threading.Timer(0.2, os.kill, (victim, signal.SIGKILL)).start()
    with pytest.raises(ParameterError, match="ended the process"):
        checker.check(form(json=slow(2)))
    assert checker.check(form(regex="abcd"))


def test_when_enough_slow_ones_compile_another_is_refused_and_quick_ones_pass(
    checker: Checker,
) -> None:
    for _ in range(SLOW):  # as if that many were at it
        assert checker._slow.acquire(blocking=False)
    try:
        with pytest.raises(ParameterError, match="while others do too: try again later"):
            checker.check(form(json=slow(4)))
        assert checker.check(form(regex="quick"))
    finally:
        checker._slow.release(SLOW)
    with pytest.raises(ParameterError, match="takes longer than 1 s"):  # that was no verdict
        checker.check(form(json=slow(4)))


async def test_the_event_loop_goes_on_meanwhile(checker: Checker) -> None:
    job = asyncio.create_task(checker.acheck(form(json=slow(20))))
    turns = 0
    while not job.done():
        await asyncio.sleep(0.01)
        turns += 1
    assert isinstance(job.exception(), ParameterError) and turns > 20


async def test_one_who_leaves_does_not_take_the_verdict_from_others(checker: Checker) -> None:
    asked = form(json={"enum": [f"v{i}" for i in range(3000)]})
    first, second = (asyncio.create_task(checker.acheck(asked)) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    assert "v2999" in await second


def test_helpers_end_with_their_checker() -> None:
    checker = Checker(lambda: BYTES, 1.0)
    checker.check(form(regex="a"))
    [pid] = helpers(checker)
    checker.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
