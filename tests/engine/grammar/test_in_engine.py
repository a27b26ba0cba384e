"""Grammars through a whole engine: every text fits, others are untouched, nothing leaks."""

import itertools
import re
from collections.abc import Iterator
from typing import Any

import pytest

from octavo.engine.core import EngineCore
from octavo.engine.grammar.compiler import Compiler
from tests.engine.grammar.words import VOCABULARY, text_of, words_grammar
from tests.engine.invariants import check, check_drained
from tests.engine.test_recovery import break_at
from tests.engine.tiny import EOS, Client, Reference, begin_anew, prompt

WORDS = ["abc", "abba", "cab", "a" * 9, "10.01", "aabb"]
LONG = r"[ab]{30,60}"  # every text is long enough to be preempted


@pytest.fixture
def core(llama: EngineCore) -> Iterator[EngineCore]:
    """The shared engine with nothing in it, and a vocabulary for grammars."""
    begin_anew(llama)
    before, llama.grammars = llama.grammars, Compiler(lambda: VOCABULARY)
    yield llama
    llama.grammars.close()
    llama.grammars = before


def regex(pattern: str) -> str:
    return f"start: /{pattern}/"


def drain(client: Client) -> None:
    while client.core.has_work():
        client.turn()
        check(client.core)
    check_drained(client.core)
    assert not client.core.host.compiling


def test_every_text_is_a_word_and_ends_by_itself(core: EngineCore) -> None:
    client = Client(core)
    asked: dict[str, Any] = {"grammar": words_grammar(WORDS), "max_tokens": 20}
    handles = [client.add(prompt(5 + i), temperature=1.0, seed=i, **asked) for i in range(10)]
    several = client.add(prompt(30), temperature=1.0, seed=3, n=4, **asked)
    drain(client)
    for handle in [*handles, *range(several, several + 4)]:
        assert client.finished[handle].reason == "stop"
        assert client.tokens[handle][-1] in EOS and text_of(client.tokens[handle]) in WORDS
    assert len({text_of(t) for t in client.tokens.values()}) > 2


def test_those_without_a_grammar_say_what_they_would_alone(
    core: EngineCore, reference: Reference
) -> None:
    client = Client(core)
    for i in range(3):
        client.add(prompt(9 + i), grammar=regex(LONG), temperature=1.0, max_tokens=70)
    handles = [client.add(prompt(20 + i), max_tokens=25) for i in range(3)]
    drain(client)
    for i, handle in enumerate(handles):
        assert client.tokens[handle] == reference.text(prompt(20 + i), 25)


def test_preemption_keeps_the_place_in_the_grammar(core: EngineCore) -> None:
    client = Client(core)
    handles = [
        client.add(prompt(20 + i), grammar=regex(LONG), temperature=1.0, seed=i, max_tokens=70)
        for i in range(6)
    ]
    drain(client)
    assert core.host.counters.preemptions > 0
    for handle in handles:
        assert client.finished[handle].reason == "stop"
        assert re.fullmatch(LONG, text_of(client.tokens[handle]))


@pytest.mark.parametrize("kind", ["forward", "masked"])
def test_a_failed_step_keeps_the_place_in_the_grammar(
    core: EngineCore, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    client = Client(core)
    break_at(core, monkeypatch, kind, first=9)
    asked: dict[str, Any] = {"grammar": regex(LONG), "temperature": 1.0, "max_tokens": 70}
    handles = [client.add(prompt(8 + i), seed=i, **asked) for i in range(3)]
    client.drain()
    assert core.recovery.restarts == 1
    for handle in handles:
        assert re.fullmatch(LONG, text_of(client.tokens[handle]))


def test_aborts_at_any_time_leave_nothing(core: EngineCore) -> None:
    for turns, n in itertools.product(range(7), (1, 3)):
        client = Client(core)
        # Another grammar each time, so that some are aborted while it compiles.
        grammar = regex(f"[ab]{{20,{40 + turns + 10 * n}}}")
        gone = client.add(prompt(9), grammar=grammar, temperature=1.0, n=n, max_tokens=60)
        stays = client.add(prompt(9, tail=1), grammar=words_grammar(WORDS), max_tokens=20)
        for _ in range(turns):
            client.turn()
        client.abort(range(gone, gone + n))
        drain(client)
        assert text_of(client.tokens[stays]) in WORDS


def test_the_first_of_several_may_leave_before_it_has_a_grammar(core: EngineCore) -> None:
    client = Client(core)
    asked: dict[str, Any] = {"grammar": words_grammar(WORDS), "temperature": 1.0}
    first = client.add(prompt(9), n=3, max_tokens=20, **asked)
    client.abort([first])
    drain(client)
    assert [text_of(client.tokens[h]) in WORDS for h in (first + 1, first + 2)] == [True, True]


def test_other_wishes_hold_beside_the_grammar(core: EngineCore) -> None:
    client = Client(core)
    a, b, ab = (VOCABULARY.tokens.index(t) for t in (b"a", b"b", b"ab"))
    drawn: dict[str, Any] = {"temperature": 1.0, "max_tokens": 30}
    only = client.add(prompt(9), grammar=regex("[abc]+"), allowed_token_ids=[a, b], **drawn)
    never = client.add(prompt(9), grammar=regex("[ab]{5,9}"), bad_words=[[ab], [a, a]], **drawn)
    later = client.add(prompt(9), grammar=regex("[ab]+"), min_tokens=12, **drawn)
    short = client.add(prompt(9), grammar=regex("abc"), min_tokens=12, **drawn)
    drain(client)
    assert set(client.tokens[only]) <= {a, b, *EOS}
    said = client.tokens[never]
    assert ab not in said and (a, a) not in set(itertools.pairwise(said))
    assert len(client.tokens[later]) >= 12
    assert text_of(client.tokens[short]) == "abc", "a grammar that has ended wins"
    assert all(client.finished[h].reason != "error" for h in (only, never, later, short))


def test_where_no_token_is_left_the_request_alone_ends_with_the_reason(core: EngineCore) -> None:
    client = Client(core)
    a = VOCABULARY.tokens.index(b"a")
    stuck = client.add(prompt(9), grammar=regex("abc"), allowed_token_ids=[a], max_tokens=9)
    fine = client.add(prompt(9), grammar=regex("abc"), max_tokens=9)
    drain(client)
    finish = client.finished[stuck]
    assert (finish.reason, finish.status) == ("error", 400)
    assert "`allowed_token_ids`" in finish.message
    assert text_of(client.tokens[fine]) == "abc"


def test_a_grammar_that_nobody_checked_ends_its_own_request(core: EngineCore) -> None:
    client = Client(core)
    wrong = client.add(prompt(9), grammar="start: (", n=2, temperature=1.0, max_tokens=9)
    fine = client.add(prompt(9), grammar=regex("abc"), max_tokens=9)
    drain(client)
    assert [client.finished[h].status for h in (wrong, wrong + 1)] == [400, 400]
    assert text_of(client.tokens[fine]) == "abc"


def test_an_end_that_is_ignored_is_followed_by_ends_alone(core: EngineCore) -> None:
    client = Client(core)
    handle = client.add(prompt(9), grammar=regex("abc"), ignore_eos=True, max_tokens=12)
    drain(client)
    tokens = client.tokens[handle]
    assert text_of(tokens) == "abc" and len(tokens) == 12
    assert set(tokens[-5:]) <= set(EOS)


def test_the_grammar_waits_for_its_marker(core: EngineCore, reference: Reference) -> None:
    client = Client(core)
    free = reference.text(prompt(20), 12, ignore_eos=True)
    marker = free[4:6]
    handle = client.add(
        prompt(20), grammar=regex("abc"), mask_after=marker, ignore_eos=True, max_tokens=12
    )
    drain(client)
    tokens = client.tokens[handle]
    assert tokens[:6] == free[:6]
    assert text_of(tokens[6:]) == "abc"


def test_log_probabilities_come_beside_a_grammar(core: EngineCore) -> None:
    client = Client(core)
    handle = client.add(prompt(9), grammar=regex("abc"), logprobs=2, max_tokens=9)
    drain(client)
    assert text_of(client.tokens[handle]) == "abc"
    assert len(client.logprobs[handle]) == len(client.tokens[handle])


def test_only_steps_with_a_grammar_wait_for_the_step_before(core: EngineCore) -> None:
    client = Client(begin_anew(core, depth=4))
    client.add(prompt(9), grammar=regex("[ab]{12}"), max_tokens=20)
    client.add(prompt(9, tail=2), max_tokens=60, ignore_eos=True)
    beside: set[int] = set()
    alone: set[int] = set()
    while len(client.tokens[1]) < 50:
        client.turn()
        if len(client.tokens[0]) > 2:
            (alone if client.finished else beside).add(len(core.host.flights))
    assert (beside, max(alone)) == ({1}, 3)
    client.drain()
