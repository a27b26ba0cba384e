"""Log probabilities of a whole engine, against those of reference logits."""

from collections.abc import Iterator

import numpy as np
import pytest

from octavo.engine.core import EngineCore
from octavo.engine.messages import Logprobs
from tests.engine.conftest import few_buckets
from tests.engine.tiny import (
    LLAMA,
    VOCAB,
    Client,
    Reference,
    begin_anew,
    make_engine,
    make_parts,
    prompt,
    run_one,
)

PROMPT = prompt(21, tail=2)


@pytest.fixture
def core(llama: EngineCore) -> EngineCore:
    """The shared engine with nothing in it."""
    return begin_anew(llama)


def busy(core: EngineCore) -> Client:
    """Three greedy requests under way, so that the others share their batch."""
    client = Client(core)
    for i in range(3):
        client.add(prompt(9 + i, 1, 2, i), max_tokens=40, ignore_eos=True)
    for _ in range(3):
        client.turn()
    return client


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    out: np.ndarray = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return out


def rows_agree(rows: list[Logprobs], reference: Reference, text: list[int], count: int) -> None:
    """Every row is log_softmax of the reference at its position."""
    expected = log_softmax(reference.logits(text))
    for row in rows:
        tokens, values = np.frombuffer(row.tokens, np.int32), np.frombuffer(row.logprobs, "<f4")
        want = expected[row.position - 1]
        assert tokens[0] == text[row.position] and len(tokens) == 1 + count
        np.testing.assert_allclose(values, want[tokens], atol=1e-4)
        np.testing.assert_allclose(values[1:], np.sort(want)[::-1][:count], atol=1e-4)
        assert row.rank == 1 + int((want > want[tokens[0]] + 1e-6).sum())


@pytest.mark.parametrize("count", [0, 1, 5])
def test_logprobs_are_those_of_the_reference(
    core: EngineCore, reference: Reference, count: int
) -> None:
    client = busy(core)
    handle = client.add(PROMPT, max_tokens=12, temperature=1.0, seed=1, logprobs=count)
    client.drain()
    text = PROMPT + client.tokens[handle]
    rows = client.logprobs[handle]
    assert [row.position for row in rows] == list(range(len(PROMPT), len(text)))
    rows_agree(rows, reference, text, count)
    assert set(client.logprobs) == {handle}


def test_named_tokens_get_their_logprobs_in_the_answer_and_in_the_prompt(
    core: EngineCore, reference: Reference
) -> None:
    client = busy(core)
    named, of_prompt = [3, 17, 3], [5, 40]
    handle = client.add(
        PROMPT,
        max_tokens=6,
        logprobs=1,
        logprob_token_ids=named,
        prompt_logprob_token_ids=of_prompt,
        prompt_logprob_start=2,
    )
    client.drain()
    text = PROMPT + client.tokens[handle]
    expected = log_softmax(reference.logits(text))
    rows = client.logprobs[handle]
    assert sorted(row.position for row in rows) == list(range(2, len(text)))
    for row in rows:
        tokens, values = np.frombuffer(row.tokens, np.int32), np.frombuffer(row.logprobs, "<f4")
        asked = of_prompt if row.position < len(PROMPT) else named
        assert tokens[-row.named :].tolist() == asked
        np.testing.assert_allclose(values, expected[row.position - 1][tokens], atol=1e-4)


@pytest.mark.parametrize("budget", [0, 16])
def test_prompt_logprobs_are_those_of_the_reference_in_one_chunk_or_many(
    core: EngineCore, reference: Reference, budget: int
) -> None:
    core = begin_anew(core, budget=budget)
    run_one(core, prompt(40), max_tokens=1)  # its pages are there, and must not be used
    client = busy(core)
    handle = client.add(prompt(40), max_tokens=3, prompt_logprobs=4)
    client.drain()
    rows = client.logprobs[handle]
    assert [row.position for row in rows] == list(range(1, 40))
    rows_agree(rows, reference, prompt(40), 4)
    assert client.tokens[handle] == reference.text(prompt(40), 3)


def test_prompt_logprobs_come_once_however_often_the_request_starts_again(
    core: EngineCore, reference: Reference
) -> None:
    client = Client(core)
    handles = [
        client.add(prompt(30 + i), max_tokens=40, ignore_eos=True, prompt_logprobs=1)
        for i in range(5)
    ]
    client.drain()
    assert core.host.counters.preemptions > 0
    for i, handle in enumerate(handles):
        rows = client.logprobs[handle]
        assert [row.position for row in rows] == list(range(1, 30 + i))
        rows_agree(rows, reference, prompt(30 + i), 1)


@pytest.fixture(scope="module")
def talkative() -> Iterator[EngineCore]:
    """An engine that may be asked for the whole vocabulary."""
    parts = make_parts(
        LLAMA,
        backend=few_buckets,
        max_model_len=96,
        max_num_seqs=2,
        max_num_batched_tokens=16,
        page_size=4,
        num_pages=40,
        max_logprobs=-1,
    )
    core = make_engine(parts)
    yield core
    core.close()


def test_minus_one_asks_for_the_whole_vocabulary(
    talkative: EngineCore, reference: Reference
) -> None:
    client = Client(talkative)
    handle = client.add(PROMPT, max_tokens=4, ignore_eos=True, logprobs=-1, prompt_logprobs=-1)
    client.drain()
    text = PROMPT + client.tokens[handle]
    assert sorted(row.position for row in client.logprobs[handle]) == list(range(1, len(text)))
    rows_agree(client.logprobs[handle], reference, text, VOCAB)
