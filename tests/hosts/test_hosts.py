"""Two processes are one engine: the same tokens, one order a step, and one end for both.

OCTAVO_HOSTS_FULL=1 adds four processes, SmolLM2 on three, and other ways to end.
"""

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from safetensors.numpy import save_file

import octavo
from tests.hosts.cluster import Cluster, start, until_ready
from tests.server.tiny_model import write_tiny_model

FULL = bool(os.environ.get("OCTAVO_HOSTS_FULL"))
full = pytest.mark.skipif(not FULL, reason="OCTAVO_HOSTS_FULL=1 runs it")
SIZES = {"max_model_len": 4096, "max_num_seqs": 1, "max_num_batched_tokens": 32, "num_pages": 260}
SMALL = {**SIZES, "dtype": "float32"}
LAYERS, WIDTH, HEADS = 2, 32, 4
LOST_WITHIN = 30.0  # seconds
PROMPTS = ([5, 9, 77, 31, 8] * 9, [101, 7, 6])
REQUESTS = (
    {"temperature": 0, "max_tokens": 64, "ignore_eos": True},
    {"temperature": 0.9, "seed": 5, "top_p": 0.9, "max_tokens": 64, "ignore_eos": True},
    {"temperature": 0.7, "seed": 6, "logprobs": 2, "max_tokens": 12, "ignore_eos": True},
)


def flags(settings: dict[str, Any]) -> list[str]:
    return [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]


def write_model(folder: Path) -> Path:
    """A tiny llama with heads to cut, and random weights."""
    path = write_tiny_model(folder) / "config.json"
    config = json.loads(path.read_text()) | {"num_hidden_layers": LAYERS, "hidden_size": WIDTH}
    config |= {"num_attention_heads": HEADS, "num_key_value_heads": HEADS}
    config |= {"intermediate_size": 2 * WIDTH, "max_position_embeddings": 4096}
    path.write_text(json.dumps(config))
    random = np.random.default_rng(1)
    shapes = {"model.embed_tokens": (259, WIDTH), "lm_head": (259, WIDTH)}
    for i in range(LAYERS):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            shapes[f"model.layers.{i}.self_attn.{name}"] = (WIDTH, WIDTH)
        shapes[f"model.layers.{i}.mlp.gate_proj"] = (2 * WIDTH, WIDTH)
        shapes[f"model.layers.{i}.mlp.up_proj"] = (2 * WIDTH, WIDTH)
        shapes[f"model.layers.{i}.mlp.down_proj"] = (WIDTH, 2 * WIDTH)
    weights = {
        f"{name}.weight": random.standard_normal(shape, np.float32) / shape[1] ** 0.5
        for name, shape in shapes.items()
    }
    norms = [f"model.layers.{i}.input_layernorm" for i in range(LAYERS)]
    norms += [f"model.layers.{i}.post_attention_layernorm" for i in range(LAYERS)]
    weights |= {f"{name}.weight": np.ones(WIDTH, np.float32) for name in (*norms, "model.norm")}
    save_file(weights, folder / "model.safetensors")
    return folder


def answers(cluster: Cluster) -> list[str]:
    """The text of every request."""
    out = []
    for prompt in PROMPTS:
        for request in REQUESTS:
            got = cluster.leader.post("/v1/completions", {"prompt": prompt, **request})
            assert got.status_code == 200, got.text
            out.append(got.json()["choices"][0]["text"])
    return out


def expected(model: str, settings: dict[str, Any]) -> list[str]:
    """The same of one process with one device."""
    llm = octavo.LLM(model=model, **settings)
    try:
        prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS for _ in REQUESTS]
        params = [octavo.SamplingParams(**request) for _ in PROMPTS for request in REQUESTS]
        return [got.outputs[0].text for got in llm.generate(prompts, params)]
    finally:
        llm.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def pair(model: Path, tmp_path_factory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("logs")
    cluster = start(str(model), 2, folder, *flags(SMALL), "--mesh=model=2")
    try:
        yield until_ready(cluster)
    finally:
        cluster.close()


def test_two_hosts_give_the_tokens_of_one(model, pair) -> None:
    assert answers(pair) == expected(str(model), SMALL)
    assert pair.leader.metric("octavo:compiles_after_ready_total") == 0


def test_a_decode_step_costs_the_leader_a_few_bytes_and_they_are_counted(pair) -> None:
    def totals() -> tuple[float, ...]:
        names = ("steps", "host_orders", "host_order_bytes")
        return tuple(pair.leader.metric(f"octavo:{name}_total") for name in names)

    def spent(tokens: int) -> tuple[float, ...]:
        before = totals()
        body = {"prompt": [7, 8, 9], "max_tokens": tokens, "ignore_eos": True, "temperature": 0}
        assert pair.leader.post("/v1/completions", body).status_code == 200
        time.sleep(0.6)  # the engine says where it stands four times a second
        return tuple(b - a for a, b in zip(before, totals(), strict=True))

    short, long = spent(10), spent(210)
    steps, orders, size = (b - a for a, b in zip(short, long, strict=True))
    assert 195 <= steps <= 205
    assert orders == steps
    assert 5 * steps < size < 32 * steps


def test_a_follower_answers_probes_and_nothing_else(pair) -> None:
    follower = pair.hosts[1]
    assert follower.get("/health").json()["host"] == 1
    assert follower.get("/ready").status_code == 200
    refused = follower.post("/v1/completions", {"prompt": "hello"})
    assert refused.status_code == 404
    assert "not the leader" in refused.json()["error"]["message"]


def test_a_host_killed_in_mid_stream_ends_the_engine_and_nothing_hangs(pair) -> None:
    """Ends the pair: the last test that has it."""
    body = {"prompt": [5, 6], "max_tokens": 4000, "ignore_eos": True, "stream": True}
    events: list[str] = []
    with httpx.stream(
        "POST", f"{pair.leader.url}/v1/completions", json=body, timeout=LOST_WITHIN
    ) as stream:
        for line in stream.iter_lines():
            if line and not events:
                os.kill(pair.engine_of(1), signal.SIGKILL)
                killed = time.monotonic()
            events += [line] if line else []
    assert time.monotonic() - killed < LOST_WITHIN
    assert any("error" in event and "host 1 is gone" in event for event in events[-3:]), events[-3:]

    refused = pair.leader.post("/v1/completions", {"prompt": "hello"})
    assert refused.status_code == 503
    assert "host 1 is gone" in refused.json()["error"]["message"]
    assert pair.leader.get("/health").status_code == 503
    assert pair.ended(1) == 1
    assert "SIGKILL" in pair.log(1)
    pair.leader.process.terminate()
    assert pair.ended(0) == 1


@full
def test_followers_end_cleanly_with_their_leader_and_with_one_that_is_killed(
    model, tmp_path
) -> None:
    settings = [*flags(SMALL), "--mesh=model=2"]
    cluster = until_ready(start(str(model), 2, tmp_path, *settings))
    cluster.leader.process.terminate()
    assert [cluster.ended(i) for i in (0, 1)] == [0, 0], cluster.log(1)

    cluster = until_ready(start(str(model), 2, tmp_path, *settings))
    cluster.leader.process.kill()
    assert cluster.ended(1) == 1
    assert "is gone" in cluster.log(1)


@full
def test_hosts_with_different_settings_are_told_so_on_both(model, tmp_path) -> None:
    cluster = start(
        str(model), 2, tmp_path, *flags(SMALL), "--mesh=model=2", own={1: "--page-size=32"}
    )
    try:
        assert [cluster.ended(i) for i in (0, 1)] == [2, 2]
        words = "host 1 was started with `page_size` 32, the leader with 0"
        assert words in cluster.log(0)
        assert words in cluster.log(1)
    finally:
        cluster.close()


@full
def test_four_hosts_give_the_tokens_of_one(model, tmp_path) -> None:
    cluster = start(str(model), 4, tmp_path, *flags(SMALL), "--mesh=model=4")
    try:
        assert answers(until_ready(cluster)) == expected(str(model), SMALL)
    finally:
        cluster.close()


@full
def test_three_hosts_give_the_tokens_of_one_with_smollm2(tmp_path) -> None:
    """Three, because it has nine heads."""
    settings = {**SIZES, "max_model_len": 512, "num_pages": 70, "dtype": "float32"}
    cluster = start("smollm2-135m", 3, tmp_path, *flags(settings), "--mesh=model=3")
    try:
        assert answers(until_ready(cluster)) == expected("smollm2-135m", settings)
    finally:
        cluster.close()
