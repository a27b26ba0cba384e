"""What the engine says of itself for /metrics adds up."""

from octavo.engine.core import EngineCore
from octavo.engine.messages import ITERATION_TOKENS
from tests.engine.tiny import Client, begin_anew, prompt


def test_every_token_of_every_step_is_counted_once(llama: EngineCore) -> None:
    core = begin_anew(llama, budget=16)
    client = Client(core)
    for seed, length in enumerate((5, 30, 17)):
        client.add(prompt(length, seed, 3, seed), max_tokens=9, ignore_eos=True)
    while core.has_work():
        client.turn()
    stats = core.stats()
    assert len(stats.iterations) == len(ITERATION_TOKENS) + 1
    assert stats.iteration_tokens == stats.prompt_tokens + stats.generation_tokens
    assert stats.generation_tokens == 27
    assert sum(stats.iterations[:1]) < sum(stats.iterations) <= stats.steps
    assert (stats.deferred, stats.waiting) == (0, 0)
    assert stats.resident_bytes > 10_000_000


def test_choices_that_wait_for_their_first_one_are_deferred(llama: EngineCore) -> None:
    core = begin_anew(llama, budget=16)
    client = Client(core)
    client.add(prompt(40, 1, 1, 1), max_tokens=3, n=3, temperature=1.0)
    assert (core.stats().waiting, core.stats().deferred) == (3, 2)
    while core.has_work():
        client.turn()
    assert core.stats().deferred == 0


def test_pages_that_the_index_gives_up_are_counted(llama: EngineCore) -> None:
    core = begin_anew(llama, budget=16)
    client = Client(core)
    pages = core.stats().pages[0]
    size = core.limits.dims.page_size
    assert core.stats().evictions == 0
    for seed in range(2 + pages * size // 48):  # more than the pool holds, one after the other
        client.add([(seed * 7 + i) % 120 for i in range(48)], max_tokens=2)
        while core.has_work():
            client.turn()
    assert core.stats().evictions > 0
