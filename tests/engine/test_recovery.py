"""A step that raises costs its requests time and nothing else; a second one is fatal."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest

from octavo.engine.core import EngineCore
from octavo.engine.recovery import EngineFailure
from tests.engine.invariants import check, check_drained
from tests.engine.tiny import Client, Reference, begin_anew, prompt


class BrokenProgram:
    """A fake: stands in for a compiled program, and raises when the calls say so."""

    def __init__(self, program: Any, fails: Callable[[], bool]) -> None:
        self.program, self.fails = program, fails

    def __call__(self, *arguments: Any) -> Any:
        if self.fails():
            raise RuntimeError("the device said no")
        return self.program(*arguments)


def break_at(
    core: EngineCore, monkeypatch: pytest.MonkeyPatch, kind: str, *, first: int = 1, last: int = 0
) -> None:
    """Calls number first to last (first alone if 0) of one kind of program raise."""
    calls = itertools.count(1)

    def fails() -> bool:
        return first <= next(calls) <= (last or first)

    programs = getattr(core.device.programs, kind)
    if isinstance(programs, dict):
        for key, program in programs.items():
            monkeypatch.setitem(programs, key, BrokenProgram(program, fails))
    else:
        monkeypatch.setattr(core.device.programs, kind, BrokenProgram(programs, fails))


def crowd(client: Client) -> list[tuple[int, list[int], dict[str, Any]]]:
    """Six requests of all sorts: handle, prompt and what its reference needs."""
    out: list[tuple[int, list[int], dict[str, Any]]] = []
    for i in range(6):
        text = prompt(8 + 7 * i, tail=1)
        drawn: dict[str, Any] = {"temperature": 1.0, "seed": i} if i % 2 else {}
        out.append((client.add(text, max_tokens=20, **drawn), text, drawn))
    return out


@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize("prefix_caching", [True, False])
@pytest.mark.parametrize("kind", ["forward", "sample", "edit"])
def test_one_failure_changes_no_text(
    llama: EngineCore,
    reference: Reference,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    prefix_caching: bool,
    depth: int,
) -> None:
    core = begin_anew(llama, depth=depth, prefix_caching=prefix_caching, budget=16)
    break_at(core, monkeypatch, kind, first=2 if kind == "edit" else 9)
    client = Client(core)
    asked = crowd(client)
    while core.has_work():
        client.turn()
        check(core)
    check_drained(core)
    assert core.recovery.restarts == core.stats().restarts == 1
    for handle, text, drawn in asked:
        assert client.tokens[handle] == reference.text(text, 20, **drawn)


def test_what_was_aborted_stays_so_through_a_failure(
    llama: EngineCore, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = begin_anew(llama, depth=3)
    client = Client(core)
    asked = crowd(client)
    for _ in range(3):
        client.turn()
    break_at(core, monkeypatch, "forward")
    client.abort([asked[0][0], asked[3][0]])
    client.drain()
    check_drained(core)
    for handle, text, drawn in asked:
        if handle not in client.aborted:
            assert client.tokens[handle] == reference.text(text, 20, **drawn)


def test_choices_that_wait_for_their_first_survive_a_failure(
    llama: EngineCore, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = begin_anew(llama, budget=16)
    client = Client(core)
    handle = client.add(prompt(50), n=3, temperature=1.0, seed=2, max_tokens=6)
    client.turn()
    break_at(core, monkeypatch, "forward")
    client.drain()
    check_drained(core)
    for i in range(3):
        want = reference.text(prompt(50), 6, temperature=1.0, seed=2, choice=i)
        assert client.tokens[handle + i] == want


def test_a_second_failure_is_fatal_and_says_why(
    llama: EngineCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = begin_anew(llama)
    with monkeypatch.context() as patch:
        break_at(core, patch, "sample", last=99)
        client = Client(core)
        crowd(client)
        with pytest.raises(EngineFailure, match="failed again after a restart.*RuntimeError: the"):
            client.drain()


def test_later_requests_have_a_failure_of_their_own(
    llama: EngineCore, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = begin_anew(llama)
    for _ in range(2):
        with monkeypatch.context() as patch:
            break_at(core, patch, "greedy")
            client = Client(core)
            handle = client.add(prompt(12), max_tokens=5)
            client.drain()
            assert client.tokens[handle] == reference.text(prompt(12), 5)
    assert core.recovery.restarts == 2


def test_a_request_survives_failures_that_let_it_go_on_in_between(
    llama: EngineCore, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = begin_anew(llama)
    client = Client(core)
    handle = client.add(prompt(12), max_tokens=30, ignore_eos=True)
    for tokens in (3, 9):
        while len(client.tokens.get(handle, [])) < tokens:
            client.turn()
        with monkeypatch.context() as patch:
            break_at(core, patch, "greedy")
            client.turn()
    client.drain()
    assert core.recovery.restarts == 2
    assert client.tokens[handle] == reference.text(prompt(12), 30, ignore_eos=True)
