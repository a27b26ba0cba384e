"""Whole engines under random traces: nothing leaks, nobody overtakes, and the text is right."""

import math
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from octavo.engine.core import EngineCore
from tests.engine.invariants import check_drained
from tests.engine.tiny import Client, Reference, begin_anew, prompt
from tests.engine.traces import LONGEST, rules, run_trace, traces


@settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate],
)
@given(rule=rules, trace=traces)
def test_any_trace_leaks_nothing_keeps_the_order_and_gives_the_right_text(
    llama: EngineCore, reference: Reference, rule: dict[str, Any], trace: list[Any]
) -> None:
    run_trace(begin_anew(llama, **rule), reference, trace)


def crowd(**changes: Any) -> list[Any]:
    """Ten long requests at once, far more than the pages hold."""
    base = {"which": 0, "tail": 2, "max_tokens": 60, "n": 1, "warm": False, "priority": 0}
    return [
        ("add", base | {"length": 10 + 2 * i, "tail_seed": i % 3, "salt": ""} | changes)
        for i in range(10)
    ]


@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize("prefix_caching", [True, False])
def test_a_crowd_preempts_and_everyone_still_gets_the_right_text(
    llama: EngineCore, reference: Reference, depth: int, prefix_caching: bool
) -> None:
    core = begin_anew(llama, depth=depth, prefix_caching=prefix_caching)
    run_trace(core, reference, crowd())
    assert core.host.counters.preemptions > 0


def test_shared_prompts_are_found_again_and_evicted_when_others_need_the_pages(
    llama: EngineCore, reference: Reference
) -> None:
    core = begin_anew(llama)
    one = {"which": 0, "tail": 1, "max_tokens": 4, "n": 1, "warm": False, "priority": 0, "salt": ""}
    first, again = one | {"length": 40, "tail_seed": 0}, one | {"length": 40, "tail_seed": 1}
    run_trace(core, reference, [("add", first)])
    run_trace(core, reference, [("add", again)])
    assert core.host.counters.prefix_hits == 40
    run_trace(core, reference, [("add", again | {"salt": "other"})])
    assert core.host.counters.prefix_hits == 40, "another salt must not find the pages"
    others = [("add", one | {"length": 80, "which": 1, "tail_seed": i}) for i in range(3)]
    run_trace(core, reference, others)
    assert any(page for page in core.host.pools[0].index.pages())
    run_trace(core, reference, [("add", first)])


def test_a_hit_leaves_one_token_to_run_even_when_every_page_is_known(
    llama: EngineCore, reference: Reference
) -> None:
    core = begin_anew(llama)
    for _ in range(2):
        client = Client(core)
        handle = client.add(prompt(32), max_tokens=6)
        client.drain()
        assert client.tokens[handle] == reference.text(prompt(32), 6)
    assert client.starts[0].cached_tokens == 28


def test_the_longest_prompt_gets_its_one_token(llama: EngineCore, reference: Reference) -> None:
    core = begin_anew(llama)
    client = Client(core)
    handle = client.add(prompt(LONGEST - 1), max_tokens=None)
    too_long = client.add(prompt(LONGEST), max_tokens=None)
    client.drain()
    check_drained(core)
    assert client.tokens[handle] == reference.text(prompt(LONGEST - 1), 1)
    assert client.finished[too_long].reason == "error"
    assert "shorten it by 1" in client.finished[too_long].message


def test_one_token_each_for_more_requests_than_slots(
    llama: EngineCore, reference: Reference
) -> None:
    one = {"which": 1, "max_tokens": 1, "n": 1, "warm": False, "priority": 0, "salt": "", "tail": 3}
    trace = [("add", one | {"length": i, "tail_seed": i % 3}) for i in range(30)]
    run_trace(begin_anew(llama, depth=3), reference, trace)


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_choices_go_on_when_the_first_one_is_aborted(
    llama: EngineCore, reference: Reference, prefix_caching: bool
) -> None:
    family: dict[str, Any] = {
        "length": 30,
        "which": 0,
        "tail": 1,
        "tail_seed": 0,
        "max_tokens": 9,
        "n": 3,
    }
    family |= {"warm": True, "priority": 0, "salt": ""}
    for turns in (0, 1, 2, 3, 5):
        core = begin_anew(llama, prefix_caching=prefix_caching, budget=16)
        trace = [("add", family), ("turns", turns), ("abort", 0)]
        client = run_trace(core, reference, trace)
        assert {1, 2} <= set(client.finished)


def test_priority_decides_who_waits(llama: EngineCore) -> None:
    client = Client(begin_anew(llama, by_priority=True, budget=16))
    handles = [client.add(prompt(14, tail=2, tail_seed=i), priority=-i) for i in range(5)]
    client.drain()
    assert [start.handle for start in client.starts] == handles[::-1]


def test_a_queue_that_is_full_refuses_with_the_number(llama: EngineCore) -> None:
    core = begin_anew(llama)
    client, most = Client(core), core.intake.max_queued
    core.intake.max_queued = 3
    try:
        handles = [client.add(prompt(5)) for _ in range(5)]
        client.drain()
    finally:
        core.intake.max_queued = most
    refused = [h for h in handles if client.finished[h].reason == "error"]
    assert refused == handles[3:]
    assert client.finished[handles[4]].status == 503
    assert "3 requests wait already" in client.finished[handles[4]].message


@pytest.mark.parametrize("turns", [0, 1, 3])
def test_a_request_past_its_time_limit_ends_and_frees_its_pages(
    llama: EngineCore, reference: Reference, turns: int
) -> None:
    core = begin_anew(llama, depth=3)
    core._looked = math.inf  # not before the turns are over
    client = Client(core)
    late = client.add(prompt(20), n=3, temperature=1.0, max_tokens=70, arrival=1e-9, timeout=1e-9)
    fine = client.add(prompt(20), max_tokens=5)
    for _ in range(turns):
        client.turn()
    core._looked = 0.0
    client.drain()
    check_drained(core)
    assert [client.finished[late + i].status for i in range(3)] == [408] * 3
    assert "time limit" in client.finished[late].message
    assert client.tokens[fine] == reference.text(prompt(20), 5)


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        ({"tokens": []}, "empty"),
        ({"tokens": [3, VOCABULARY := 128]}, "outside the vocabulary of 128"),
        ({"tokens": [3], "logit_bias": {VOCABULARY: 1.0}}, "`logit_bias` names token 128"),
        ({"tokens": [3], "allowed_token_ids": [500]}, "`allowed_token_ids` names token 500"),
        ({"tokens": [3], "bad_words": [[3, 200]]}, "`bad_words` names token 200"),
    ],
)
def test_what_cannot_be_served_is_refused_in_one_sentence(
    llama: EngineCore, request_: dict[str, Any], says: str
) -> None:
    client = Client(begin_anew(llama))
    handle = client.add(request_.pop("tokens"), **request_)
    client.drain()
    assert client.finished[handle].status == 400
    assert says in client.finished[handle].message


def test_rows_move_only_with_a_plan_that_is_sent(llama: EngineCore, reference: Reference) -> None:
    """The last of four ends while nothing else is to be run: its row must stay where it is."""
    one = {"which": 0, "n": 1, "warm": False, "priority": 0, "salt": "", "tail": 1, "length": 3}
    trace = [("add", one | {"tail_seed": 0, "max_tokens": n}) for n in (1, 1, 1, 2)]
    run_trace(begin_anew(llama, depth=2, prefix_caching=False), reference, trace)


def test_a_handle_may_be_used_again_right_after_its_abort(
    llama: EngineCore, reference: Reference
) -> None:
    core = begin_anew(llama, depth=3)
    first, second = Client(core), Client(core)
    first.add(prompt(30), max_tokens=40, ignore_eos=True)
    for _ in range(4):
        first.turn()
    first.abort([0])
    handle = second.add(prompt(20, 1), max_tokens=12)
    assert handle == 0
    for _ in range(6):
        second.turn()
    assert 0 in core.host.live and not second.finished, "or an abort would not find it"
    second.drain()
    check_drained(core)
    assert second.tokens[0] == reference.text(prompt(20, 1), 12)
    assert second.finished[0].reason in ("stop", "length")
