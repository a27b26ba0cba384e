"""A long mixed run: the host does not stop the device, nothing compiles, the state is donated."""

import random

import jax
import pytest

from octavo.engine.compiles import WATCH
from octavo.engine.core import EngineCore
from tests.engine.invariants import check_drained
from tests.engine.tiny import Client, Reference, begin_anew, prompt


def addresses(core: EngineCore) -> list[int]:
    """Where the leaves of the state are: the same for ever, when every step is in place."""
    return [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(core.device.state)]


@pytest.fixture
def texts(reference: Reference) -> list[tuple[list[int], int, list[int]]]:
    """40 requests and their texts, made before the engine runs: references compile."""
    chance = random.Random(5)
    out = []
    for i in range(40):
        text = prompt(chance.randrange(3, 60), i % 2, 2, i % 3)
        count = chance.randrange(5, 30)
        out.append((text, count, reference.text(text, count)))
    return out


def test_a_long_mixed_run_neither_waits_nor_compiles_nor_copies(
    llama: EngineCore, texts: list[tuple[list[int], int, list[int]]]
) -> None:
    core = begin_anew(llama, depth=2, budget=16)
    counts = core.reader.counts
    stalls, compiles = counts.stalls, WATCH.unexpected
    reads = counts.ready + counts.paced + counts.stalls
    client, chance, home = Client(core), random.Random(6), addresses(core)
    asked, waiting, gaps = [], list(texts), 0
    while waiting or core.has_work():
        if waiting and chance.random() < 0.15:
            text, count, want = waiting.pop(0)
            asked.append((client.add(text, max_tokens=count), want))
        had_work = core.has_work()
        client.turn()
        assert addresses(core) == home, "a leaf of the state was copied, not donated"
        gaps += had_work and not core.has_work()
    assert WATCH.unexpected == compiles, "a program was compiled while requests waited"
    check_drained(core)
    assert core.host.counters.steps >= 200
    assert all(client.tokens[handle] == want for handle, want in asked)
    # A read may stall where nothing else could be in flight: at the last step before the engine is
    # idle, and where pages had to come back before anything could be dispatched.
    idle = gaps + core.host.counters.waits + core.host.counters.preemptions
    assert counts.stalls - stalls <= idle < 20
    assert counts.ready + counts.paced + counts.stalls - reads == core.host.counters.steps


def test_a_steady_batch_never_stalls(llama: EngineCore, reference: Reference) -> None:
    """Six rows decode together: while one step runs the next is always out."""
    core = begin_anew(llama, depth=2)
    client = Client(core)
    for i in range(6):
        client.add(prompt(4 + i), max_tokens=12, ignore_eos=True)
    stalls = core.reader.counts.stalls
    client.drain()
    assert core.host.counters.preemptions == 0
    assert core.reader.counts.stalls - stalls <= 1, "only the last step has nothing behind it"


def test_masked_rows_are_read_before_they_are_sampled_and_only_they_wait(
    llama: EngineCore, reference: Reference
) -> None:
    """A mask needs every token before it, so such a step reads the one before; it never reads its
    own result early."""
    core = begin_anew(llama, depth=2)
    client = Client(core)
    handle = client.add(prompt(20), max_tokens=10, bad_words=[[3, 4]], ignore_eos=True)
    reads = core.reader.counts.ready + core.reader.counts.paced + core.reader.counts.stalls
    client.drain()
    counts = core.reader.counts
    assert counts.ready + counts.paced + counts.stalls - reads == core.host.counters.steps == 10
    assert client.tokens[handle] == reference.text(prompt(20), 10, ignore_eos=True)
