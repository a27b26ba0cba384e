"""LLM and AsyncLLM with a model that reads: golden embeddings, scores, and clear refusals."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from octavo import LLM, AsyncLLM
from octavo.engine.config import ConfigError
from tests.e2e.golden import need
from tests.e2e.test_embeddings import GOLDEN, MODEL, OTHERS, ROUNDED, TEXT


@pytest.fixture(scope="module")
def minilm() -> Iterator[LLM]:
    need(MODEL)
    with LLM(MODEL, quiet=True) as llm:
        yield llm


def test_embed_gives_the_golden_embedding(minilm: LLM) -> None:
    outputs = minilm.embed([TEXT, *OTHERS], use_tqdm=False)
    vectors = np.array([output.outputs.embedding for output in outputs])
    assert outputs[0].prompt_token_ids == GOLDEN["input_ids"]
    np.testing.assert_allclose(vectors[0, :5], GOLDEN["first5"], atol=ROUNDED)
    cosines = list(GOLDEN["cosine"].values())
    np.testing.assert_allclose(vectors[1:] @ vectors[0], cosines, atol=ROUNDED)
    scores = [one.outputs.score for one in minilm.score(TEXT, OTHERS, use_tqdm=False)]
    np.testing.assert_allclose(scores, cosines, atol=ROUNDED)


def test_encode_gives_one_array_of_any_kind_of_prompt(minilm: LLM) -> None:
    ids = GOLDEN["input_ids"]
    rows = minilm.encode([TEXT, ids, {"prompt": TEXT}, {"prompt_token_ids": ids}])
    assert rows.shape == (4, 384) and rows.dtype == np.float32
    np.testing.assert_allclose(rows[1:], rows[[0, 0, 0]], atol=1e-6)
    raw = minilm.encode(TEXT, normalize=False)
    assert np.linalg.norm(raw) > 2
    np.testing.assert_allclose(raw[0] / np.linalg.norm(raw), rows[0], atol=1e-6)


def test_what_a_reading_model_cannot_do_is_said(minilm: LLM) -> None:
    with pytest.raises(ValueError, match="use embed, encode or score"):
        minilm.generate("Hello")
    with pytest.raises(ValueError, match="use embed, encode or score"):
        minilm.chat([{"role": "user", "content": "Hello"}])
    with pytest.raises(ValueError, match="this model reads 256"):
        minilm.embed("river " * 400)
    assert minilm.embed("river " * 400, truncate_prompt_tokens=-1)[0].outputs.hidden_size == 384
    with pytest.raises(ConfigError, match="BertModel only reads"):
        LLM(MODEL, quiet=True, runner="generate")


def test_a_saved_reading_model_is_the_same_one(minilm: LLM, tmp_path: Path) -> None:
    with LLM(str(minilm.save(tmp_path / "saved")), quiet=True) as saved:
        np.testing.assert_array_equal(saved.encode(TEXT), minilm.encode(TEXT))


def test_a_model_that_generates_reads_when_asked_to(tiny: Path) -> None:
    with LLM(str(tiny), load_format="dummy", quiet=True, max_num_seqs=2) as llm:
        with pytest.raises(ValueError, match='runner="pooling"'):
            llm.embed("a")
    with LLM(str(tiny), load_format="dummy", quiet=True, runner="pooling") as llm:
        rows = llm.encode([[5, 6, 7], [5, 6, 7, 8], [9, 7]])
        np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)
        with pytest.raises(ValueError, match="has the token 999"):
            llm.encode([[5, 999]])


async def test_async_callers_are_read_together() -> None:
    need(MODEL)
    async with AsyncLLM(MODEL, quiet=True) as llm:
        made = await asyncio.gather(*(llm.embed(text) for text in (TEXT, *OTHERS)))
        np.testing.assert_allclose(made[0].outputs.embedding[:5], GOLDEN["first5"], atol=ROUNDED)
        with pytest.raises(ValueError, match="use embed"):
            async for _ in llm.generate("Hello"):
                pass
