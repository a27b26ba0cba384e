"""A served MiniLM, asked as its users ask: the openai client, scores, ranks, and refusals."""

import base64
import concurrent.futures
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

from tests.e2e.golden import need
from tests.e2e.served import end, serve
from tests.server.conftest import Server

MODEL = "all-minilm-l6-v2"
ROWS = json.loads((Path(__file__).parent.parent / "golden" / "greedy.json").read_text())
GOLDEN = next(row for row in ROWS if row["id"] == "minilm_embedding")
TEXT = GOLDEN["text_in"]
OTHERS = list(GOLDEN["cosine"])
ROUNDED = 1e-4  # the golden figures have four to five digits


@pytest.fixture(scope="module")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    need(MODEL)
    log = tmp_path_factory.mktemp("minilm") / "log"
    server = serve(MODEL, log=log)
    yield server
    compiled = server.metric("octavo:compiles_after_ready_total")
    assert end(server) == 0, log.read_text()
    assert compiled == 0
    assert "curl" in log.read_text() and "/v1/embeddings" in log.read_text()


def vector(server: Server, **body: Any) -> np.ndarray:
    answer = server.post("/v1/embeddings", {"input": TEXT, **body})
    assert answer.status_code == 200, answer.text
    return np.array(answer.json()["data"][0]["embedding"], np.float32)


def test_the_openai_client_gets_the_golden_embedding(minilm: Server) -> None:
    answer = minilm.openai().embeddings.create(model=MODEL, input=[TEXT, *OTHERS])
    vectors = np.array([item.embedding for item in answer.data])
    assert [item.index for item in answer.data] == [0, 1, 2]
    np.testing.assert_allclose(vectors[0, :5], GOLDEN["first5"], atol=ROUNDED)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(
        vectors[1:] @ vectors[0], list(GOLDEN["cosine"].values()), atol=ROUNDED
    )
    assert answer.usage.prompt_tokens == answer.usage.total_tokens
    assert answer.usage.prompt_tokens > len(GOLDEN["input_ids"])


def test_text_ids_floats_and_base64_are_one_embedding(minilm: Server) -> None:
    want = vector(minilm)
    np.testing.assert_array_equal(vector(minilm, input=[TEXT]), want)
    np.testing.assert_array_equal(vector(minilm, input=GOLDEN["input_ids"]), want)
    np.testing.assert_array_equal(vector(minilm, input=[GOLDEN["input_ids"]]), want)
    raw = minilm.post("/v1/embeddings", {"input": TEXT, "encoding_format": "base64"}).json()
    got = np.frombuffer(base64.b64decode(raw["data"][0]["embedding"]), "<f4")
    np.testing.assert_array_equal(got, want)
    answer = minilm.openai().embeddings.create(model=MODEL, input=TEXT, encoding_format="float")
    np.testing.assert_allclose(answer.data[0].embedding, want, atol=1e-7)


def test_fewer_dimensions_are_the_first_ones_at_length_1(minilm: Server) -> None:
    short = vector(minilm, dimensions=64)
    whole = vector(minilm)[:64]
    assert short.shape == (64,)
    np.testing.assert_allclose(short, whole / np.linalg.norm(whole), atol=1e-6)


def test_a_long_text_is_refused_or_cut(minilm: Server) -> None:
    long = "river " * 400
    refused = minilm.post("/v1/embeddings", {"input": long})
    assert refused.status_code == 400
    assert "402 tokens, and this model reads 256" in refused.json()["error"]["message"]
    cut = vector(minilm, input=long, truncate_prompt_tokens=-1)
    np.testing.assert_allclose(cut, vector(minilm, input="river " * 254), atol=1e-6)


def test_many_texts_at_once_are_each_as_alone(minilm: Server) -> None:
    texts = [f"number {i} " + "and so on " * (i % 40) for i in range(150)]
    answer = minilm.openai().embeddings.create(model=MODEL, input=texts)
    got = np.array([item.embedding for item in answer.data])
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        alone = list(threads.map(lambda i: vector(minilm, input=texts[i]), (0, 17, 39, 149)))
    np.testing.assert_allclose(got[[0, 17, 39, 149]], alone, atol=2e-6)


def test_scores_are_cosines_one_with_many_and_each_with_its_own(minilm: Server) -> None:
    cosines = list(GOLDEN["cosine"].values())
    for path in ("/v1/score", "/score"):
        answer = minilm.post(path, {"text_1": TEXT, "text_2": OTHERS}).json()
        np.testing.assert_allclose([d["score"] for d in answer["data"]], cosines, atol=ROUNDED)
        assert answer["object"] == "list" and answer["data"][1]["object"] == "score"
    each = minilm.post("/score", {"text_1": [TEXT, *OTHERS], "text_2": [TEXT, *OTHERS]}).json()
    np.testing.assert_allclose([d["score"] for d in each["data"]], 1, atol=1e-6)
    wrong = minilm.post("/score", {"text_1": [TEXT, TEXT], "text_2": ["a", "b", "c"]})
    assert wrong.status_code == 400 and wrong.json()["error"]["param"] == "text_2"


def test_documents_come_back_with_the_best_first(minilm: Server) -> None:
    body = {"query": TEXT, "documents": [OTHERS[1], {"text": OTHERS[0]}, "Trains are late."]}
    for path in ("/v1/rerank", "/rerank", "/v2/rerank"):
        answer = minilm.post(path, body).json()
        results = answer["results"]
        assert results[0]["index"] == 1
        assert results[0]["document"] == {"text": OTHERS[0]}
        scores = [result["relevance_score"] for result in results]
        assert scores == sorted(scores, reverse=True) and len(scores) == 3
        assert answer["usage"]["total_tokens"] > 0
    best = minilm.post("/rerank", {**body, "top_n": 1, "return_documents": False}).json()
    assert [set(r) for r in best["results"]] == [{"index", "relevance_score"}]


@pytest.mark.parametrize(
    ("path", "body", "param", "says"),
    [
        ("/v1/embeddings", {"input": []}, "input", "must not be empty"),
        ("/v1/embeddings", {"input": ["a", 3]}, "input", "mixes"),
        ("/v1/embeddings", {"input": [99999999]}, "input", "ids are from 0 to 30521"),
        ("/v1/embeddings", {"input": "a", "dimensions": 999}, "dimensions", "from 1 to 384"),
        ("/v1/embeddings", {"input": "a", "encoding_format": "x"}, "encoding_format", "x"),
        ("/v1/embeddings", {"input": "a", "truncate_prompt_tokens": 0}, None, "from 1 to 256"),
        ("/v1/embeddings", {"input": "a", "truncate_prompt_tokens": 999}, None, "from 1 to 256"),
        ("/v1/rerank", {"query": "a", "documents": []}, "documents", "must not be empty"),
        ("/v1/score", {"text_1": "a"}, "text_2", "required"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}, None, "embed"),
        ("/v1/completions", {"prompt": "x"}, "model", "/v1/embeddings"),
    ],
)
def test_what_cannot_be_served_is_one_clear_400(
    minilm: Server, path: str, body: Any, param: str | None, says: str
) -> None:
    answer = minilm.post(path, body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert says in error["message"]
    assert param is None or error["param"] == param


def test_the_openai_client_names_an_unknown_model(minilm: Server) -> None:
    with pytest.raises(openai.NotFoundError):
        minilm.openai().embeddings.create(model="other", input="a")
    assert [m.id for m in minilm.openai().models.list()] == [MODEL]


def test_a_model_that_generates_refuses_embeddings_and_says_what_to_do(
    launch: Any,
) -> None:
    server = launch()
    answer = server.post("/v1/embeddings", {"input": "a"})
    assert answer.status_code == 400
    assert "--runner pooling" in answer.json()["error"]["message"]
    good = server.post("/v1/completions", {"prompt": "a", "max_tokens": 2})
    assert good.status_code == 200
