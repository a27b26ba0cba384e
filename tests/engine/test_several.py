"""Several decode steps in one program: the same text, fewer dispatches, and no step too many."""

from dataclasses import replace
from typing import Any

import pytest

from octavo.backends.select import select
from octavo.engine.core import EngineCore
from octavo.engine.host import Host, Limits
from octavo.engine.memory import _rows
from octavo.engine.scheduler import _trim
from octavo.engine.sequence import Sequence
from octavo.engine.state import Dims, PageGroup
from tests.engine.invariants import check, check_drained
from tests.engine.tiny import LLAMA, Client, Reference, begin_anew, make_parts, prompt
from tests.engine.traces import add


def reads(core: EngineCore) -> int:
    counts = core.reader.counts
    return counts.ready + counts.paced + counts.stalls


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("warm", [False, True])
def test_programs_of_three_steps_give_the_same_text_with_a_third_of_the_reads(
    llama: EngineCore, reference: Reference, depth: int, warm: bool
) -> None:
    core = begin_anew(llama, depth=depth, steps=3)
    client = Client(core)
    asked: dict[int, Any] = {}
    one = {"which": 0, "tail": 0, "tail_seed": 0, "max_tokens": 31, "n": 1, "warm": warm}
    for i in range(3):
        add(client, one | {"length": 5 + 3 * i, "priority": 0, "salt": ""}, asked)
    before = reads(core)
    while core.has_work():
        client.turn()
        check(core)
    check_drained(core)
    for handle, (text, count, drawn) in asked.items():
        assert client.tokens[handle] == reference.text(text, count, **drawn)
    assert reads(core) - before <= core.host.counters.steps // 2


def test_rows_that_end_between_the_steps_of_a_program_free_their_pages(
    llama: EngineCore, reference: Reference
) -> None:
    core = begin_anew(llama, steps=3)
    client = Client(core)
    handles = {client.add(prompt(6 + n), max_tokens=n, ignore_eos=True): n for n in (4, 5, 6, 17)}
    while core.has_work():
        client.turn()
        check(core)
    check_drained(core)
    assert {handle: len(client.tokens[handle]) for handle in handles} == handles


def test_the_end_of_the_last_row_is_run_step_by_step(llama: EngineCore) -> None:
    """Two tokens after the prompt's are fewer than a program of three steps holds."""
    core = begin_anew(llama, steps=3)
    client = Client(core)
    client.add(prompt(6), max_tokens=3, ignore_eos=True)
    client.drain()
    assert core.host.counters.steps == 3


def test_a_prompt_that_waits_keeps_the_steps_single(llama: EngineCore) -> None:
    core = begin_anew(llama, steps=3, budget=16)
    client = Client(core)
    client.add(prompt(6), max_tokens=40, ignore_eos=True)
    client.turn()
    client.turn()
    assert any(flight.parts == 3 for flight in core.host.flights)
    client.add(prompt(60), max_tokens=2, ignore_eos=True)  # in chunks of 16
    for _ in range(3):
        client.turn()
        assert core.host.flights[-1].parts == 1
    client.drain()
    check_drained(core)


def test_only_small_models_of_a_backend_that_says_so_take_several_steps() -> None:
    settings: dict[str, Any] = {"max_model_len": 96, "max_num_seqs": 8, "page_size": 4}
    plain = make_parts(LLAMA, **settings).resolved
    assert plain.steps == 1 and plain.several_rows == () and select("cpu").small_model == 0


def test_any_model_over_a_mesh_takes_several_steps_in_row_buckets_of_its_own() -> None:
    backend = replace(select("cpu"), mesh_steps=4, mesh_rows=(2, 6, 32))
    assert _rows(backend, 8, 1 << 40, meshed=True) == ((2, 6, 8), (2, 6, 8), 4)
    assert _rows(backend, 8, 1 << 40, meshed=False) == ((1, 2, 4, 8), (), 1)


def dims() -> Dims:
    return Dims(8, 16, 4096, 128, (PageGroup(0, 64),), controls=8, max_chunk=2048)


@pytest.mark.parametrize(
    ("counts", "want"),
    [
        ([600], [512]),  # 512 now and 88 next are less than 1,024
        ([300, 300], [300, 212]),
        ([900], [900]),  # 124 tokens of padding are cheaper than a step
        ([400], [400]),  # small steps cost the same whatever they hold
        ([700, 50], [700, 50]),  # the last prompt alone cannot give as much
        ([1024], [1024]),
    ],
)
def test_the_last_prompt_is_cut_where_padding_would_cost_more(
    counts: list[int], want: list[int]
) -> None:
    host = Host(Limits(dims(), (8,), (128, 512, 1024, 2048), 2, False, False))
    whole = Sequence.__new__(Sequence)  # never looked at
    chunks = [(whole, 0, count, True) for count in counts]
    _trim(host, chunks)
    assert [count for _, _, count, _ in chunks] == want
    assert [final for *_, final in chunks] == [a == b for a, b in zip(counts, want, strict=True)]
