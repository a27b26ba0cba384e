"""Texts and pairs as token ids, cut to a limit as transformers cuts them; vectors as numbers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from octavo.engine.messages import Pooler, Ready
from octavo.engine.sampling_params import ParameterError
from octavo.engine.text.opened import ModelText
from octavo.engine.text.reading import Texts, check_dimensions, embedding, pairs, pooler_for, score
from octavo.engine.text.tokenizer import Tokenizer, load_tokenizer
from octavo.models.checkpoint import locate
from tests.e2e.golden import need

FIRST = "how many people live in the city of Paris"
SECOND = "Paris is a city with about two million people. " * 3
READY = Ready("m", 32, 30522, [], 8, 512, [], 0.0, pooler=Pooler("embed", 4))


@pytest.fixture(scope="module")
def folder() -> Path:
    need("all-minilm-l6-v2")
    return locate("all-minilm-l6-v2")


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(str(folder))


@pytest.mark.parametrize("limit", [None, 4, 12, 20, 30, 200])
@pytest.mark.parametrize("texts", [(FIRST, None), (FIRST, SECOND), (SECOND, FIRST)])
def test_texts_are_cut_as_transformers_cuts_them(
    tokenizer: Tokenizer, theirs: Any, texts: tuple[str, str | None], limit: int | None
) -> None:
    ids, second = tokenizer.encode_within(*texts, limit)
    want = theirs(*texts, truncation=limit is not None, max_length=limit)
    assert len(ids) == len(want["input_ids"])
    types = want["token_type_ids"]
    if sum(types):  # which of two texts gives the odd token is not the same in every version
        assert abs(second - types.index(1)) <= 1
    else:
        assert (ids, second) == (want["input_ids"], 0)
    if limit in (None, 200):
        assert ids == want["input_ids"]


def test_a_limit_below_the_special_tokens_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="must be at least 4 here, got 3"):
        tokenizer.encode_within(FIRST, SECOND, 3)


def test_lists_of_ids_are_checked_and_cut_at_the_end(tokenizer: Tokenizer) -> None:
    text = ModelText(tokenizer, None, "", {})
    ids = list(range(100, 140))
    assert Texts(text, READY, -1).one(ids).ids == ids[:32]
    with pytest.raises(ParameterError, match="has a text of 40 tokens, and this model reads 32"):
        Texts(text, READY).one(ids)
    with pytest.raises(ParameterError, match="`input` has the token 30522"):
        Texts(text, READY).one([5, 30522])
    with pytest.raises(ParameterError, match="from 1 to 32, or -1, got 33"):
        Texts(text, READY, 33).one(ids)
    with pytest.raises(ParameterError, match="a text without tokens"):
        Texts(text, READY).one([])
    without = ModelText(None, None, "there is no tokenizer", {})
    with pytest.raises(ParameterError, match="must be token ids, not text: there is no tokenizer"):
        Texts(without, READY).one("a")


def test_vectors_are_cut_and_scaled() -> None:
    raw = np.array([3, 4, 0, 12], "<f4").tobytes()
    pooler = Pooler("embed", 4)
    np.testing.assert_allclose(embedding(raw, pooler), np.array([3, 4, 0, 12]) / 13, atol=1e-7)
    np.testing.assert_allclose(embedding(raw, pooler, 2), [0.6, 0.8], atol=1e-7)
    np.testing.assert_array_equal(embedding(raw, pooler, normalize=False), [3, 4, 0, 12])
    with pytest.raises(ParameterError, match="must be one of 2, 4, got 3"):
        check_dimensions(Pooler("embed", 4, dimensions=[2, 4]), 3)


def test_scores_go_through_the_models_own_function() -> None:
    raw = np.array([0.5], "<f4").tobytes()
    assert score(raw, Pooler("score", 1)) == pytest.approx(1 / (1 + np.exp(-0.5)))
    assert score(raw, Pooler("score", 1, activation="identity")) == 0.5


def test_pairs_are_one_with_many_or_each_with_its_own() -> None:
    assert pairs(["q"], ["a", "b"]) == [("q", "a"), ("q", "b")]
    assert pairs(["q", "r"], ["a", "b"]) == [("q", "a"), ("r", "b")]
    for first, second in ((["q", "r"], ["a"]), (["q", "r"], ["a", "b", "c"]), ([], ["a"])):
        with pytest.raises(ParameterError):
            pairs(first, second)


def test_an_engine_that_does_something_else_says_what_to_do() -> None:
    generates = Ready("m", 32, 30522, [], 8, 512, [], 0.0)
    with pytest.raises(ValueError, match="--runner pooling"):
        pooler_for(generates, "embed")
    scores = Ready("m", 32, 30522, [], 8, 512, [], 0.0, pooler=Pooler("score", 1))
    with pytest.raises(ValueError, match="gives scores for pairs of texts here, and no embeddings"):
        pooler_for(scores, "embed")
