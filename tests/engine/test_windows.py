"""Layers that see a window: their pages come back, and the text stays what it must be."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings

from octavo.engine.assemble import Parts
from octavo.engine.core import EngineCore
from tests.engine.conftest import few_buckets
from tests.engine.invariants import check, check_drained, strict_order
from tests.engine.tiny import (
    EOS,
    GEMMA3,
    MISTRAL,
    Client,
    Reference,
    begin_anew,
    make_engine,
    make_parts,
    prompt,
)
from tests.engine.traces import LONGEST, rules, run_trace, traces

WINDOW = 12
FACTS = {"gemma3": GEMMA3, "mistral": MISTRAL}


@pytest.fixture(scope="module", params=FACTS)
def parts(request: Any) -> Parts:
    """Gemma 3 has two page groups, this Mistral only one with a window."""
    return make_parts(
        FACTS[request.param],
        eos=EOS,
        backend=few_buckets,
        max_model_len=LONGEST,
        max_num_seqs=4,
        max_num_batched_tokens=64,
        page_size=4,
        num_pages=50,
    )


@pytest.fixture(scope="module")
def engine(parts: Parts) -> Iterator[EngineCore]:
    core = make_engine(parts)
    yield core
    core.close()


@pytest.fixture(scope="module")
def alone(parts: Parts) -> Reference:
    return Reference(parts)


def play(core: EngineCore, alone: Reference, asked: list[tuple[list[int], int]]) -> Client:
    """All at once, checked after every turn; every text must be that of one sequence alone."""
    client = Client(core)
    with strict_order():
        handles = [client.add(text, max_tokens=n, ignore_eos=True) for text, n in asked]
        while core.has_work():
            client.turn()
            check(core)
    check_drained(core)
    assert core.recovery.restarts == 0
    for handle, (text, n) in zip(handles, asked, strict=True):
        assert client.tokens[handle] == alone.text(text, n, ignore_eos=True)
    return client


@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize("prefix_caching", [True, False])
def test_long_texts_with_chunked_prompts_are_right(
    engine: EngineCore, alone: Reference, depth: int, prefix_caching: bool
) -> None:
    core = begin_anew(engine, depth=depth, prefix_caching=prefix_caching, budget=16)
    play(core, alone, [(prompt(10 + 9 * i, i % 2), 80 - 9 * i) for i in range(7)])


def test_a_prompt_longer_than_the_window_comes_in_one_chunk(
    engine: EngineCore, alone: Reference
) -> None:
    core = begin_anew(engine)
    play(core, alone, [(prompt(60), 30), (prompt(64, 1), 12)])
    assert core.host.counters.steps < 40


def test_pages_that_a_window_left_come_back_while_the_text_goes_on(engine: EngineCore) -> None:
    """A row never holds more than its window and what the scheduler lets gather."""
    core = begin_anew(engine, prefix_caching=False)
    client = Client(core)
    for i in range(4):
        client.add(prompt(6, tail=2, tail_seed=i), max_tokens=36, ignore_eos=True)
    pools = [pool for pool in core.host.pools if pool.group.window]
    most = 0
    while core.has_work():
        client.turn()
        for pool in pools:
            most = max(most, int(np.max(pool.held - pool.first)))
    assert pools and most <= -(-WINDOW // 4) + 5 < 44 // 4
    assert core.host.counters.preemptions == 0


def test_a_hit_needs_only_the_window_of_the_prefix(engine: EngineCore, alone: Reference) -> None:
    core = begin_anew(engine)
    play(core, alone, [(prompt(40, tail=1), 5)])
    play(core, alone, [(prompt(40, tail=2, tail_seed=2), 30)])
    assert core.host.counters.prefix_hits == 40
    for pool in core.host.pools:
        if pool.group.window:
            assert pool.window_first(40) == (40 - WINDOW + 1) // 4


def test_many_long_texts_preempt_and_are_still_right(engine: EngineCore, alone: Reference) -> None:
    core = begin_anew(engine, depth=3)
    play(core, alone, [(prompt(20 + i, tail=1, tail_seed=i % 3), 70) for i in range(9)])
    open_groups = any(not pool.group.window for pool in core.host.pools)
    assert (core.host.counters.preemptions > 0) == open_groups


@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate],
)
@given(rule=rules, trace=traces)
def test_any_trace_leaks_nothing_keeps_the_order_and_gives_the_right_text(
    engine: EngineCore, alone: Reference, rule: dict[str, Any], trace: list[Any]
) -> None:
    run_trace(begin_anew(engine, **rule), alone, trace)


def test_a_window_pool_that_barely_fits_still_gets_everyone_done() -> None:
    """Pages of what windows left must come back even where no step could run without them."""
    small = make_parts(
        MISTRAL,
        backend=few_buckets,
        max_model_len=LONGEST,
        max_num_seqs=4,
        max_num_batched_tokens=16,
        page_size=4,
        num_pages=9,
    )
    core = make_engine(small)
    try:
        play(core, Reference(small), [(prompt(20 + 10 * i, i % 2), 30) for i in range(6)])
    finally:
        core.close()
