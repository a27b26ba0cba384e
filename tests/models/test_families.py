"""Every family beside transformers: a tiny random checkpoint, float32, the plain operations."""

import functools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from octavo.models.registry import Model
from tests.models.check import Sequence, load, prompt, torch_greedy, torch_logits
from tests.models.tiny import FAMILIES, tiny_model

TOLERANCE = 1e-4  # logits of size 10, float32 sums in another order
PROMPT = 23  # longer than the windows of 8


@functools.cache
def both(family: str) -> tuple[Any, Model, Any, list[int]]:
    """The transformers model, ours, its parameters, and 64 greedy tokens with clear choices."""
    for seed in range(20):
        theirs = tiny_model(family, seed)
        chosen, gap = torch_greedy(theirs, prompt(PROMPT), 64)
        if gap > 1e-3:
            with tempfile.TemporaryDirectory() as folder:
                theirs.save_pretrained(folder)
                return theirs, *load(Path(folder)), chosen
    raise AssertionError(f"no seed of {family} chooses clearly")


@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_then_decode_gives_the_logits_of_transformers(family: str) -> None:
    theirs, model, params, chosen = both(family)
    want = torch_logits(theirs, prompt(PROMPT) + chosen[:16])
    ours = Sequence(model, params)
    np.testing.assert_allclose(ours(prompt(PROMPT)), want[:PROMPT], atol=TOLERANCE, rtol=0)
    for i, token in enumerate(chosen[:16]):
        np.testing.assert_allclose(ours([token])[0], want[PROMPT + i], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_transformers(family: str) -> None:
    _, model, params, chosen = both(family)
    ours = Sequence(model, params)
    tokens = [int(np.argmax(ours(prompt(PROMPT))[-1]))]
    while len(tokens) < 64:
        tokens.append(int(np.argmax(ours(tokens[-1:])[-1])))
    assert tokens == chosen


def test_a_prompt_in_chunks_gives_the_logits_of_one_pass() -> None:
    _, model, params, _ = both("llama")
    whole, parts = Sequence(model, params), Sequence(model, params)
    want = whole(prompt(PROMPT))
    got = np.concatenate([parts(prompt(PROMPT)[:7]), parts(prompt(PROMPT)[7:])])
    np.testing.assert_allclose(got, want, atol=TOLERANCE, rtol=0)
