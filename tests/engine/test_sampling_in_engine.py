"""What a request asks of sampling, through a whole engine, against numpy on reference logits."""

from typing import Any

import numpy as np
import pytest

from octavo.engine.core import EngineCore
from tests.engine.tiny import (
    EOS,
    VOCAB,
    Client,
    Reference,
    begin_anew,
    prompt,
    run_one,
)

PROMPT = prompt(21, tail=2)


@pytest.fixture
def core(llama: EngineCore) -> EngineCore:
    """The shared engine with nothing in it."""
    return begin_anew(llama)


def edited(reference: Reference, count: int, change: Any, prompt_: list[int] = PROMPT) -> list[int]:
    """The greedy text when `change(logits f32[V], output so far)` edits every distribution."""
    out: list[int] = []
    while len(out) < count:
        logits = change(reference.logits(prompt_ + out)[-1].copy(), out)
        first, second = np.sort(logits)[[-1, -2]]
        assert first - second > 1e-4, "a near tie: choose another prompt"
        out.append(int(np.argmax(logits)))
    return out


def busy(core: EngineCore) -> Client:
    """Three greedy requests under way, so that the others share their batch."""
    client = Client(core)
    for i in range(3):
        client.add(prompt(9 + i, 1, 2, i), max_tokens=40, ignore_eos=True)
    for _ in range(3):
        client.turn()
    return client


# --- seeds


def test_a_seed_gives_the_same_text_whatever_the_batch(
    core: EngineCore, reference: Reference
) -> None:
    asked: dict[str, Any] = {"temperature": 1.0, "seed": 2**40 + 5, "max_tokens": 20}
    want = reference.text(PROMPT, 20, temperature=1.0, seed=2**40 + 5)
    assert run_one(core, PROMPT, **asked) == want
    client = busy(core)
    handle = client.add(PROMPT, **asked)
    client.drain()
    assert client.tokens[handle] == want


def test_other_seeds_and_other_choices_give_other_texts(core: EngineCore) -> None:
    client = Client(core)
    handle = client.add(PROMPT, temperature=1.0, seed=3, n=3, max_tokens=12, ignore_eos=True)
    other = client.add(PROMPT, temperature=1.0, seed=4, max_tokens=12, ignore_eos=True)
    client.drain()
    assert len({tuple(client.tokens[h]) for h in (handle, handle + 1, handle + 2, other)}) == 4


def test_requests_without_a_seed_differ_from_each_other(core: EngineCore) -> None:
    client = Client(core)
    for _ in range(3):
        client.add(PROMPT, temperature=1.0, max_tokens=12, ignore_eos=True)
    client.drain()
    assert len({tuple(text) for text in client.tokens.values()}) == 3


def test_a_preempted_request_draws_the_same_tokens_again(
    core: EngineCore, reference: Reference
) -> None:
    client = Client(core)
    asked: dict[str, Any] = {"temperature": 1.0, "ignore_eos": True, "max_tokens": 50}
    handles = [client.add(prompt(20 + i), seed=i, **asked) for i in range(6)]
    client.drain()
    assert core.host.counters.preemptions > 0
    for i, handle in enumerate(handles):
        want = reference.text(prompt(20 + i), 50, temperature=1.0, seed=i, ignore_eos=True)
        assert client.tokens[handle] == want


def test_penalties_of_a_preempted_request_count_what_it_said_before(
    core: EngineCore, reference: Reference
) -> None:
    def change(logits: np.ndarray, out: list[int]) -> np.ndarray:
        return logits - 0.7 * np.bincount(out, minlength=VOCAB)

    client = Client(core)
    asked: dict[str, Any] = {"ignore_eos": True, "max_tokens": 45}
    others = [client.add(prompt(20 + i), **asked) for i in range(4)]
    handle = client.add(PROMPT, frequency_penalty=0.7, **asked)
    client.drain()
    assert core.host.counters.preemptions > 0
    assert client.tokens[handle] == edited(reference, 45, change)
    assert client.tokens[others[0]] == reference.text(prompt(20), 45, ignore_eos=True)


@pytest.mark.parametrize("how", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}])
def test_a_draw_from_one_token_is_greedy(
    core: EngineCore, reference: Reference, how: dict[str, Any]
) -> None:
    got = run_one(core, PROMPT, temperature=1.0, max_tokens=16, **how)
    assert got == reference.text(PROMPT, 16)


# --- ends


def test_min_tokens_forbids_the_end_until_then(core: EngineCore, reference: Reference) -> None:
    def change(logits: np.ndarray, out: list[int]) -> np.ndarray:
        if len(out) < 14:
            logits[EOS] = -np.inf
        return logits

    text = prompt(13, 0, 3, 3)
    assert len(reference.text(text, 20)) < 14, "the plain text must end early"
    want = edited(reference, 20, change, text)
    ends = [i for i, token in enumerate(want) if token in EOS]
    assert run_one(core, text, max_tokens=20, min_tokens=14) == want[: (ends or [20])[0] + 1]


def test_ignore_eos_goes_on(core: EngineCore, reference: Reference) -> None:
    text = prompt(13, 0, 3, 3)
    got = run_one(core, text, max_tokens=20, ignore_eos=True)
    assert got == reference.text(text, 20, ignore_eos=True) and len(got) == 20


@pytest.mark.parametrize("others", [0, 5, 8, 30])
@pytest.mark.parametrize("where", [0, 7, 19])
def test_a_stop_token_ends_the_text_however_many_there_are(
    core: EngineCore, reference: Reference, others: int, where: int
) -> None:
    """The last of the list is the one that comes; the device itself checks eight."""
    whole = reference.text(PROMPT, 20, ignore_eos=True)
    where = whole.index(whole[where])
    never = [i for i in range(VOCAB) if i not in whole][:others]
    client = busy(core)
    handle = client.add(
        PROMPT, max_tokens=20, ignore_eos=True, stop_token_ids=[*never, whole[where]]
    )
    client.drain()
    assert client.tokens[handle] == whole[: where + 1]
    end = client.finished[handle]
    assert (end.reason, end.stop_token) == ("stop", whole[where])


def test_many_stop_tokens_wait_for_min_tokens(core: EngineCore, reference: Reference) -> None:
    whole = reference.text(PROMPT, 20, ignore_eos=True)
    never = [i for i in range(VOCAB) if i not in whole][:12]

    def change(logits: np.ndarray, out: list[int]) -> np.ndarray:
        if len(out) < 6:
            logits[[*never, whole[2]]] = -np.inf
        return logits

    want = edited(reference, 20, change)
    ends = [i for i, token in enumerate(want) if i >= 6 and token in (*never, whole[2])]
    got = run_one(
        core,
        PROMPT,
        max_tokens=20,
        min_tokens=6,
        ignore_eos=True,
        stop_token_ids=[*never, whole[2]],
    )
    assert got == want[: (ends or [19])[0] + 1]


# --- what may be said


def test_a_bias_forces_a_token_and_leaves_the_neighbours_alone(
    core: EngineCore, reference: Reference
) -> None:
    client = busy(core)
    handle = client.add(PROMPT, max_tokens=5, logit_bias={77: 100.0})
    for_bid = client.add(PROMPT, max_tokens=8, logit_bias={reference.text(PROMPT, 1)[0]: -100.0})
    plain = client.add(PROMPT, max_tokens=8)
    client.drain()
    assert client.tokens[handle] == [77] * 5
    assert client.tokens[for_bid][0] != client.tokens[plain][0]
    assert client.tokens[plain] == reference.text(PROMPT, 8)
    assert client.tokens[0] == reference.text(prompt(9, 1, 2, 0), 40, ignore_eos=True)


def test_who_comes_after_into_a_slot_inherits_nothing(
    core: EngineCore, reference: Reference
) -> None:
    bias = {token: 100.0 for token in range(60, 70)}
    marked: dict[str, Any] = {"presence_penalty": 2.0, "min_tokens": 3, "stop_token_ids": [61]}
    assert 60 <= run_one(core, PROMPT, max_tokens=3, logit_bias=bias, **marked)[0] < 70
    assert run_one(core, PROMPT, max_tokens=3, logit_bias={70: 100.0}) == [70] * 3
    text = prompt(13, 0, 3, 3)
    assert run_one(core, text, max_tokens=20) == reference.text(text, 20)


def test_the_most_biases_beside_the_longest_prompt_find_room(
    core: EngineCore, reference: Reference
) -> None:
    bias = {token: (50.0 if token == 9 else 0.25) for token in range(VOCAB)}
    assert run_one(core, prompt(95), max_tokens=1, logit_bias=bias) == [9]
    client = Client(core)
    handles = [client.add(prompt(60 + i), max_tokens=2, logit_bias=bias) for i in range(8)]
    client.drain()
    assert all(client.tokens[h] == [9, 9] for h in handles)


def test_only_allowed_tokens_are_said(core: EngineCore, reference: Reference) -> None:
    allowed = [3, 64, 65, 127]

    def change(logits: np.ndarray, out: list[int]) -> np.ndarray:
        mask = np.full(VOCAB, -np.inf)
        mask[allowed] = 0
        return logits + mask

    client = busy(core)
    handle = client.add(PROMPT, max_tokens=10, allowed_token_ids=allowed)
    client.drain()
    assert client.tokens[handle] == edited(reference, 10, change)
    assert client.tokens[1] == reference.text(prompt(10, 1, 2, 1), 40, ignore_eos=True)


def test_a_bad_word_of_several_tokens_is_never_completed(
    core: EngineCore, reference: Reference
) -> None:
    plain = reference.text(PROMPT, 12, ignore_eos=True)
    words = [plain[4:6], plain[8:11], [plain[1]]]

    def change(logits: np.ndarray, out: list[int]) -> np.ndarray:
        for *before, last in words:
            if not before or out[-len(before) :] == before:
                logits[last] = -np.inf
        return logits

    got = run_one(core, PROMPT, max_tokens=16, ignore_eos=True, bad_words=words)
    assert got == edited(reference, 16, change) != plain


@pytest.mark.parametrize(
    ("penalty", "value"),
    [("repetition_penalty", 1.6), ("presence_penalty", 1.1), ("frequency_penalty", 0.6)],
)
def test_penalties_are_those_of_numpy(
    core: EngineCore, reference: Reference, penalty: str, value: float
) -> None:
    def change(logits: np.ndarray, out: list[int]) -> np.ndarray:
        times = np.bincount(out, minlength=VOCAB)
        if penalty == "frequency_penalty":
            return logits - value * times
        if penalty == "presence_penalty":
            return logits - value * (times > 0)
        seen = np.bincount(PROMPT + out, minlength=VOCAB) > 0
        scaled = np.where(logits > 0, logits / value, logits * value)
        return np.where(seen, scaled, logits)

    want = edited(reference, 24, change)
    client = busy(core)
    asked: dict[str, Any] = {penalty: value}
    handle = client.add(PROMPT, max_tokens=24, ignore_eos=True, **asked)
    client.drain()
    assert client.tokens[handle] == want != reference.text(PROMPT, 24, ignore_eos=True)


# --- several choices


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_choices_share_the_full_pages_of_their_prompt(
    core: EngineCore, reference: Reference, prefix_caching: bool
) -> None:
    core = begin_anew(core, prefix_caching=prefix_caching)
    client = Client(core)
    handle = client.add(prompt(42), n=4, temperature=1.0, seed=5, max_tokens=9, ignore_eos=True)
    most = 0
    while core.has_work():
        client.turn()
        most = max(most, int(np.count_nonzero(core.host.pools[0].references)))
    assert most <= 10 + 4 * 3  # ten full pages of the prompt once, and 3 of each choice's own
    cached = {start.handle: start.cached_tokens for start in client.starts}
    assert cached == {handle: 0, handle + 1: 40, handle + 2: 40, handle + 3: 40}
    for i in range(4):
        want = reference.text(prompt(42), 9, temperature=1.0, seed=5, choice=i, ignore_eos=True)
        assert client.tokens[handle + i] == want
