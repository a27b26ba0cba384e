"""Several data shards in one engine, under the random traces of tests/engine.

test_mesh.py runs them together with on_eight_devices.py.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings

from octavo.backends.record import Backend
from octavo.engine.assemble import Parts
from octavo.engine.core import EngineCore
from octavo.engine.messages import FIRST_SLOT
from tests.engine.invariants import check, check_drained
from tests.engine.tiny import EOS, LLAMA, Client, Reference, begin_anew, make_parts, prompt
from tests.engine.traces import rules, run_trace, traces

LANES = 2
SIZES: dict[str, Any] = {
    "max_model_len": 96,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 16,
    "page_size": 4,
    "num_pages": 40,
}


def few_programs(backend: Backend) -> Backend:
    """Two row buckets and one prompt bucket, and programs of three decode steps."""
    return replace(
        backend,
        token_buckets=lambda most: (most,),
        small_model=1 << 30,
        small_rows=(2,),
        small_steps=3,
    )


@pytest.fixture(scope="module")
def one_device() -> Parts:
    return make_parts(LLAMA, eos=EOS, backend=few_programs, **SIZES)


@pytest.fixture(scope="module")
def reference(one_device: Parts) -> Reference:
    return Reference(one_device)


@pytest.fixture(scope="module")
def lanes() -> Iterator[EngineCore]:
    """Two data shards, each with 4 slots and 39 pages."""
    parts = make_parts(LLAMA, eos=EOS, backend=few_programs, mesh=f"data={LANES}", **SIZES)
    core = EngineCore(parts.resolved.config, parts=parts)
    assert len(core.lanes) == LANES
    yield core
    core.close()


@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate],
)
@given(rule=rules, trace=traces)
def test_any_trace_over_two_shards_leaks_nothing_and_gives_the_right_text(
    lanes: EngineCore, reference: Reference, rule: dict[str, Any], trace: list[Any]
) -> None:
    run_trace(begin_anew(lanes, **rule), reference, trace)


def crowd(count: int) -> list[Any]:
    """Long requests at once, far more than the pages of both shards hold."""
    base = {"which": 0, "tail": 2, "max_tokens": 60, "n": 1, "warm": False, "priority": 0}
    return [
        ("add", base | {"length": 10 + 2 * i, "tail_seed": i % 3, "salt": ""}) for i in range(count)
    ]


@pytest.mark.parametrize("depth", [1, 4])
def test_a_crowd_preempts_in_every_shard_and_everyone_gets_the_right_text(
    lanes: EngineCore, reference: Reference, depth: int
) -> None:
    core = begin_anew(lanes, depth=depth)
    run_trace(core, reference, crowd(16))
    assert all(host.counters.preemptions > 0 for host in core.lanes)
    assert core.stats().preemptions == sum(host.counters.preemptions for host in core.lanes)


def test_a_shard_with_nothing_to_do_runs_idle_rows(lanes: EngineCore, reference: Reference) -> None:
    core = begin_anew(lanes)
    client = Client(core)
    text = prompt(20, 0, 3, 0)
    handle = client.add(text, max_tokens=30)
    client.turn()
    assert [host.running for host in core.lanes] == [1, 0]
    while core.has_work():
        client.turn()
        check(core)
    check_drained(core)
    assert client.tokens[handle] == reference.text(text, 30, choice=0)
    assert core.lanes[0].counters.steps == core.lanes[1].counters.steps
    assert core.stats().steps == core.lanes[0].counters.steps


def test_a_request_goes_where_its_prefix_is_and_else_where_least_is_to_do(
    lanes: EngineCore,
) -> None:
    core = begin_anew(lanes)
    client = Client(core)
    for which in (0, 1):
        client.add(prompt(32, which, 2, which), max_tokens=40, ignore_eos=True)
    assert [len(host.live) for host in core.lanes] == [1, 1], "one each: nobody has a prefix"
    client.drain()
    again = client.add(prompt(32, 1, 5, 2), max_tokens=4, ignore_eos=True)
    assert again in core.lanes[1].live, "the first shard is as idle, but the second has the prompt"
    client.turn()
    beside = client.add(prompt(32, 1, 5, 1), max_tokens=4, ignore_eos=True)
    assert beside in core.lanes[0].live, "the second one's lead would be too large"
    client.drain()
    assert core.stats().prefix_hits == 32


def test_who_waits_in_vain_goes_where_there_is_room(
    lanes: EngineCore, reference: Reference
) -> None:
    core = begin_anew(lanes)
    client = Client(core)
    texts = [prompt(8 + i, i % 2, 1, i % 3) for i in range(10)]
    handles = [client.add(text, max_tokens=24) for text in texts]  # two more than there are slots
    for _ in range(4):
        client.turn()
    assert [host.waiting for host in core.lanes] == [1, 1]
    gone = [h for h in handles if core.lanes[1].live.get(h) and core.lanes[1].live[h].slot >= 0]
    stayed = [h for h in handles if core.lanes[0].live.get(h) and core.lanes[0].live[h].slot >= 0]
    client.abort(gone)
    while core.waiting:
        client.turn()
        check(core)
    assert all(h in core.lanes[0].live for h in stayed), "nobody had to end for it"
    while core.has_work():
        client.turn()
        check(core)
    check_drained(core)
    for handle, text in zip(handles, texts, strict=True):
        if handle not in gone:
            assert client.tokens[handle] == reference.text(text, 24, choice=0)


def test_all_choices_of_a_request_stay_together(lanes: EngineCore) -> None:
    core = begin_anew(lanes)
    client = Client(core)
    handle = client.add(prompt(16, 0, 0, 0), max_tokens=8, n=3, temperature=0.9, seed=3)
    assert set(core.lanes[0].live) == {handle, handle + 1, handle + 2}
    client.abort([handle + 1])
    client.drain()
    assert sorted(client.finished) == [handle, handle + 2]
    check_drained(core)


def test_a_shard_short_of_pages_preempts_its_own_and_the_other_goes_on(
    lanes: EngineCore, reference: Reference
) -> None:
    core = begin_anew(lanes)
    client = Client(core)
    crowded, beside = prompt(16, 0, 0, 0), prompt(20, 1, 3, 1)
    drawn: dict[str, Any] = {"temperature": 0.8, "seed": 7, "ignore_eos": True}
    first = client.add(crowded, max_tokens=60, n=4, **drawn)  # 304 tokens, and room for 156
    alone = client.add(beside, max_tokens=60)
    while core.has_work():
        client.turn()
        check(core)
    check_drained(core)
    assert [host.counters.preemptions > 0 for host in core.lanes] == [True, False]
    for choice in range(4):
        want = reference.text(crowded, 60, choice=choice, **drawn)
        assert client.tokens[first + choice] == want
    assert client.tokens[alone] == reference.text(beside, 60, choice=0)


def test_a_failed_step_starts_the_requests_of_all_shards_again(
    lanes: EngineCore, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = begin_anew(lanes)
    client = Client(core)
    texts = [prompt(12 + i, i % 2, 2, i % 3) for i in range(4)]
    handles = [client.add(text, max_tokens=20) for text in texts]
    for _ in range(3):
        client.turn()
    read = core.device.read

    def broken(*_: Any, **__: Any) -> Any:
        monkeypatch.setattr(core.device, "read", read)
        raise RuntimeError("a broken step, for this test")

    monkeypatch.setattr(core.device, "read", broken)
    while core.has_work():
        client.turn()
        check(core)
    check_drained(core)
    assert core.stats().restarts == 1
    for handle, text in zip(handles, texts, strict=True):
        assert client.tokens[handle] == reference.text(text, 20, choice=0)


def test_the_view_shows_the_pages_and_slots_of_all_shards(lanes: EngineCore) -> None:
    core = begin_anew(lanes)
    client = Client(core)
    for which in (0, 1):
        client.add(prompt(32, which, 2, which), max_tokens=40, ignore_eos=True)
    for _ in range(6):
        client.turn()
    view = core.view()
    pages, slots = SIZES["num_pages"], SIZES["max_num_seqs"]
    (page_map,) = view.maps
    cells = np.frombuffer(page_map.cells, "<u4") & 0xFFFF
    assert page_map.pages == len(cells) == LANES * pages
    for lane in range(LANES):
        owners = set(cells[lane * pages : (lane + 1) * pages].tolist())
        assert {c - FIRST_SLOT for c in owners if c >= FIRST_SLOT} == {lane * slots}
    rows = np.frombuffer(view.slots, "<u4").reshape(-1, 7)
    assert rows[:, 0].tolist() == [0, slots]
    assert view.stats.slots == LANES * slots and view.stats.running == 2
    assert view.stats.pages == [LANES * (pages - 1)]
    client.drain()


def test_both_texts_of_a_prompt_of_rich_and_masked_requests_are_right(
    lanes: EngineCore, reference: Reference
) -> None:
    core = begin_anew(lanes)
    each = {"which": 0, "tail": 3, "tail_seed": 0, "max_tokens": 12, "n": 1, "warm": False}
    kinds = ("logprobs", "mask", "stops", "prompt_logprobs", "")
    trace = [
        ("add", each | {"length": 8 + i, "priority": 0, "salt": "", "extra": kind})
        for i, kind in enumerate(kinds)
    ]
    run_trace(core, reference, trace)
