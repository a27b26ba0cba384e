"""A served cross-encoder; several API processes over one reading engine; made-up requests."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import schemathesis
import torch
import transformers
from hypothesis import given, settings

from octavo.cli import main as cli
from octavo.engine.text.tokenizer import load_tokenizer
from octavo.models.checkpoint import locate
from tests.e2e.golden import need
from tests.e2e.served import end, serve
from tests.e2e.test_embeddings import GOLDEN, MODEL, OTHERS, ROUNDED, TEXT
from tests.server.conftest import Server
from tests.server.test_schemathesis import CHECKS, EXAMPLES, QUIET

QUERY = "what is a river"
DOCUMENTS = ["water that flows to the sea", "a tool for screws", "a long wide stream, mostly wet"]


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Path, Server]]:
    """A random cross-encoder of one layer with MiniLM's tokenizer, and a server for it."""
    need(MODEL)
    folder = tmp_path_factory.mktemp("judge")
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 48, "num_labels": 1}
    sizes |= {"num_attention_heads": 4}
    config: Any = transformers.BertConfig(**sizes, initializer_range=0.3)  # type: ignore[arg-type]
    theirs: Any = transformers.BertForSequenceClassification(config).eval()
    theirs.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((locate(MODEL) / name).read_bytes())
    server = serve(str(folder), "--served-model-name", "judge", log=folder / "log")
    yield theirs, folder, server
    assert end(server) == 0, (folder / "log").read_text()


def judged(theirs: Any, folder: Path, query: str, documents: list[str]) -> list[float]:
    """Sigmoid of what transformers' model says of each pair."""
    tokenizer = load_tokenizer(folder)
    scores = []
    for document in documents:
        ids, second = tokenizer.encode_within(query, document)
        types = [0] * second + [1] * (len(ids) - second)
        with torch.no_grad():
            out = theirs(torch.tensor([ids]), token_type_ids=torch.tensor([types])).logits
        scores.append(float(torch.sigmoid(out)[0, 0]))
    return scores


def test_a_cross_encoder_scores_and_ranks_as_transformers_does(
    judge: tuple[Any, Path, Server],
) -> None:
    theirs, folder, server = judge
    want = judged(theirs, folder, QUERY, DOCUMENTS)
    assert max(want) - min(want) > 0.01
    answer = server.post("/score", {"text_1": QUERY, "text_2": DOCUMENTS}).json()
    np.testing.assert_allclose([d["score"] for d in answer["data"]], want, atol=1e-5)
    ranks = server.post("/v2/rerank", {"query": QUERY, "documents": DOCUMENTS}).json()["results"]
    assert [r["index"] for r in ranks] == sorted(range(3), key=lambda i: -want[i])
    long = "river " * 2000
    refused = server.post("/rerank", {"query": QUERY, "documents": [long]})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "documents"
    body = {"query": QUERY, "documents": [long], "truncate_prompt_tokens": -1}
    assert server.post("/rerank", body).json()["usage"]["total_tokens"] == 512


def test_a_cross_encoder_refuses_embeddings(judge: tuple[Any, Path, Server]) -> None:
    answer = judge[2].post("/v1/embeddings", {"input": "a"})
    assert answer.status_code == 400
    assert "gives scores for pairs of texts here" in answer.json()["error"]["message"]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """MiniLM behind two API processes, with room for few texts."""
    need(MODEL)
    log = tmp_path_factory.mktemp("shared") / "log"
    flags = ("--api-server-count", "2", "--max-num-queued-reqs", "200")
    server = serve(MODEL, *flags, log=log)
    yield server
    assert end(server) == 0, log.read_text()


async def test_every_client_gets_its_own_vectors(shared: Server) -> None:
    texts = [TEXT, *OTHERS]
    want = np.array([[1.0, *GOLDEN["cosine"].values()]] * 12)

    async def ask(i: int) -> float:
        body = {"input": [TEXT, texts[i % 3]], "encoding_format": "float"}
        async with httpx.AsyncClient(base_url=shared.url, timeout=60) as client:  # a connection
            data = (await client.post("/v1/embeddings", json=body)).json()["data"]
        one, other = (np.array(item["embedding"]) for item in data)
        return float(one @ other)

    got = await asyncio.gather(*(ask(i) for i in range(12)))
    np.testing.assert_allclose(got, [want[0][i % 3] for i in range(12)], atol=ROUNDED)


async def test_who_leaves_takes_the_work_along(shared: Server) -> None:
    many = {"input": ["river " * 250] * 90}
    async with httpx.AsyncClient(base_url=shared.url, timeout=60) as client:
        with pytest.raises(httpx.TimeoutException):
            await client.post("/v1/embeddings", json=many, timeout=0.3)
    shared.until(lambda: shared.metric("vllm:num_requests_waiting") == 0, "texts still wait")
    shared.until(lambda: shared.metric("vllm:num_requests_running") == 0, "texts still run")
    assert shared.post("/v1/embeddings", {"input": "a"}).status_code == 200


def test_more_texts_than_may_wait_are_refused_at_once(shared: Server) -> None:
    answer = shared.post("/v1/embeddings", {"input": ["a"] * 101})
    assert answer.status_code == 400
    assert "more than the 100 that may wait" in answer.json()["error"]["message"]
    assert shared.post("/v1/embeddings", {"input": ["a"] * 100}).status_code == 200


def test_a_batch_file_of_embeddings_is_answered(shared: Server, tmp_path: Path) -> None:
    line = {"custom_id": "1", "url": "/v1/embeddings", "body": {"input": TEXT}}
    (tmp_path / "in.jsonl").write_text(json.dumps(line) + "\n")
    files = ("-i", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl"))
    assert cli.main(["run-batch", "--url", shared.url, *files]) == 0
    answer = json.loads((tmp_path / "out.jsonl").read_text())["response"]["body"]
    np.testing.assert_allclose(answer["data"][0]["embedding"][:5], GOLDEN["first5"], atol=ROUNDED)


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/score", "/v1/rerank"])
def test_made_up_requests_get_described_answers(shared: Server, path: str) -> None:
    described = schemathesis.openapi.from_url(f"{shared.url}/openapi.json")

    @given(case=described[path]["POST"].as_strategy())
    @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=QUIET, derandomize=True)
    def ask(case: Any) -> None:
        response = case.call(timeout=30)
        case.validate_response(response, checks=CHECKS)

    ask()
    assert shared.post("/v1/embeddings", {"input": "still here"}).status_code == 200
