"""Engines behind one address under Ray Serve on this machine: what scaling and a loss look like.

  scale    one replica, then more clients than it should have: how long until the second one answers
  stream   what one stream costs through Ray's proxy and the door
  loss     two replicas at work, one is killed: who was answered, who was told, when another stands

Needs pip install 'octavo[ray]'.

example:
  octavo bench replicas smollm2-135m --clients 12
"""

import argparse
import importlib.util
import json
import os
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from octavo.bench.common import Row, Spread, report
from octavo.engine.config import ConfigError, EngineConfig
from octavo.engine.runner import choose_runner

PATIENCE = 600.0  # seconds for anything
NAME = "octavo-bench"
PROMPT = "Once upon a time"
KEPT = 4096  # tokens of context, enough for any answer here
ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",  # a cluster of this machine alone, gone at the end
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
    "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The model and the load."""
    parser.add_argument("model", nargs="?", default="smollm2-135m", help="what to serve")
    for name, default, help in (
        ("clients", 12, "requests at once"),
        ("output-len", 128, "tokens of each"),
        ("port", 8777, "where Ray Serve listens"),
    ):
        parser.add_argument(
            f"--{name}", type=int, default=default, metavar="N", help=f"{help} (default: {default})"
        )


def run(args: argparse.Namespace) -> int:
    """Start Ray here, measure, end it."""
    if importlib.util.find_spec("ray") is None:
        raise ConfigError("Ray is not installed", "pip install 'octavo[ray]'")
    choose_runner(EngineConfig(model=args.model))  # a model that is not here is said at once
    url = f"http://127.0.0.1:{args.port}"
    with _application(args.model, args.port):
        rows = [*_door(url, args.output_len), *_scale(url, args), *_loss(url, args)]
    settings = {"model": args.model, "clients": args.clients, "output_len": args.output_len}
    return report("replicas", settings, rows, args)


@contextmanager
def _application(model: str, port: int) -> Iterator[None]:
    os.environ.update(ENVIRONMENT)
    import ray
    from ray import serve

    from octavo.ray_serve import build

    ray.init(include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options={"port": port})
        settings = {"model": model, "max_model_len": KEPT, "served_model_name": "model"}
        replicas = {"max_replicas": 2, "target_ongoing_requests": 4, "max_ongoing_requests": 8}
        pace = {"upscale_delay": 1, "look_back": 11, "cpus": 0.5}
        serve.run(build({**settings, **replicas, **pace}), name=NAME)
        yield
    finally:
        serve.shutdown()
        ray.shutdown()


@dataclass
class Heard:
    """One answer: when its pieces came, and how it ended."""

    began: float
    times: list[float] = field(default_factory=list)
    tokens: int = 0
    error: str = ""


def _ask(url: str, tokens: int, stream: bool) -> Heard:
    body = {"prompt": PROMPT, "max_tokens": tokens, "ignore_eos": True, "stream": stream}
    body |= {"stream_options": {"include_usage": True}} if stream else {}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    heard = Heard(time.monotonic())
    with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
        for line in answer:
            heard.times.append(time.monotonic())
            data = line.removeprefix(b"data: ").strip()
            if data in (b"", b"[DONE]") or data.startswith(b":"):
                continue
            event = json.loads(data)
            heard.error = event.get("error", {}).get("message", heard.error)
            heard.tokens = (event.get("usage") or {}).get("completion_tokens", heard.tokens)
    return heard


def _door(url: str, tokens: int) -> list[Row]:
    first, between = [], []
    for _ in range(4):
        heard = _ask(url, tokens, stream=True)
        first.append((heard.times[0] - heard.began) * 1e3)
        between.append((heard.times[-1] - heard.times[0]) * 1e3 / tokens)
    return [
        Row("one stream", "ms to the first event", Spread.of(first[1:])),
        Row("one stream", "ms a token", Spread.of(between[1:])),
    ]


def _replicas() -> dict[str, Any]:
    """The replicas that run, by the names of their actors."""
    from ray import serve
    from ray.util import list_named_actors

    status = serve.status().applications[NAME].deployments["Engine"]
    named = [actor["name"] for actor in list_named_actors(all_namespaces=True)]
    return {
        "running": status.replica_states.get("RUNNING", 0),
        "names": [name for name in named if name and f"{NAME}#Engine#" in name],
    }


def _until(holds: Callable[[], bool], what: str) -> float:
    """Seconds until it held. ConfigError when it never does."""
    began = time.monotonic()
    while not holds():
        if time.monotonic() - began > PATIENCE:
            raise ConfigError(f"after {PATIENCE:.0f} s there was still no {what}")
        time.sleep(0.1)
    return time.monotonic() - began


def _scale(url: str, args: argparse.Namespace) -> list[Row]:
    stop = threading.Event()

    def keep_asking() -> int:
        answered = 0
        while not stop.is_set():
            answered += _ask(url, args.output_len, stream=False).tokens == args.output_len
        return answered

    with ThreadPoolExecutor(args.clients) as pool:
        clients = [pool.submit(keep_asking) for _ in range(args.clients)]
        seconds = _until(lambda: _replicas()["running"] == 2, "second replica")
        stop.set()
        answered = sum(client.result() for client in clients)
    return [
        Row("scale", "s from the load to the second replica", Spread.of([seconds])),
        Row("scale", "requests answered meanwhile", Spread.of([answered]), digits=0),
    ]


def _loss(url: str, args: argparse.Namespace) -> list[Row]:
    import ray

    half = max(args.clients // 2, 1)
    with ThreadPoolExecutor(2 * half) as pool:
        asked: list[tuple[bool, Future[Heard]]] = [
            (stream, pool.submit(_ask, url, args.output_len, stream))
            for _ in range(half)
            for stream in (False, True)
        ]
        time.sleep(2.0)
        before = set(_replicas()["names"])
        victim = min(before)
        ray.kill(ray.get_actor(victim, namespace="serve"))
        began = time.monotonic()
        heard = [(stream, future.result()) for stream, future in asked]
    _until(
        lambda: _replicas()["running"] == 2 and victim not in _replicas()["names"],
        "replica in its place",
    )
    seconds = time.monotonic() - began
    whole = [h for stream, h in heard if not stream]
    streams = [h for stream, h in heard if stream]
    counts = {
        "whole answers asked for": len(whole),
        "whole answers received": sum(h.tokens == args.output_len for h in whole),
        "streams asked for": len(streams),
        "streams that ended whole": sum(h.tokens == args.output_len for h in streams),
        "streams that ended with an error event": sum(bool(h.error) for h in streams),
    }
    return [
        *(Row("loss", name, Spread.of([count]), digits=0) for name, count in counts.items()),
        Row("loss", "s from the loss until two run again", Spread.of([seconds])),
    ]
