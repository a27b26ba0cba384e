"""What clients of an OpenAI endpoint see: time to first token, time per token, throughput.

Works against any server that streams /v1/completions (prompts of random token ids) or, with --chat,
/v1/chat/completions (prompts of random words).

  TTFT  from the request to its first token
  TPOT  per output token after the first, one value per request
  ITL   between two events of a stream, every gap a value
  E2E   from the request to its last token

example:
  octavo bench serve --url http://localhost:8000 --request-rate 4 --concurrency 32
"""

import argparse
import asyncio
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from octavo.bench.common import Row, Spread, random_prompts, report
from octavo.cli.client import Endpoint, HttpError

WORDS = (
    "river stone cloud green seven light paper horse under north table glass music winter".split()
)


@dataclass
class Trace:
    """When the tokens of one request arrived, in seconds of one clock."""

    sent: float
    arrivals: list[float] = field(default_factory=list)  # one per event with text or tokens
    tokens: int = 0  # as the server's usage says, or the number of events
    prompt_tokens: int = 0
    error: str = ""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The server and the load."""
    parser.add_argument("--url", default="http://localhost:8000", help="the server")
    parser.add_argument("--api-key", default="", help="the server's key")
    parser.add_argument("--model", default="", help="a name the server lists; the first by default")
    parser.add_argument("--chat", action="store_true", help="ask /v1/chat/completions, with words")
    for name, default, help in (
        ("input-len", 128, "tokens (with --chat: words) per prompt"),
        ("output-len", 128, "tokens generated per prompt"),
        ("num-prompts", 64, "requests in all"),
        ("concurrency", 0, "requests at once; 0 has no bound"),
        ("vocab-size", 10000, "random token ids stay below this"),
        ("seed", 0, "of prompts and arrival times"),
    ):
        parser.add_argument(
            f"--{name}", type=int, default=default, metavar="N", help=f"{help} (default: {default})"
        )
    parser.add_argument(
        "--request-rate",
        type=float,
        default=math.inf,
        metavar="X",
        help="requests per second, arriving at random (default: all at once)",
    )


def run(args: argparse.Namespace) -> int:
    """Put the load on the server and print what its clients saw."""
    endpoint = Endpoint.parse(args.url, args.api_key)
    traces, seconds = asyncio.run(load(endpoint, args))
    good = [trace for trace in traces if not trace.error and trace.arrivals]
    for message in sorted({trace.error for trace in traces if trace.error}):
        print(f"# {sum(t.error == message for t in traces)} requests failed: {message}")
    keys = ("url", "chat", "input_len", "output_len", "num_prompts", "concurrency", "request_rate")
    settings = {key: getattr(args, key) for key in keys}
    settings["request_rate"] = str(args.request_rate)  # JSON has no infinity
    settings |= {"completed": len(good), "failed": len(traces) - len(good)}
    if good:
        report("serve", settings, summary(good, seconds), args)
    return 0 if len(good) == len(traces) else 1


async def load(endpoint: Endpoint, args: argparse.Namespace) -> tuple[list[Trace], float]:
    """Every request's trace, and the seconds from the first request to the last token."""
    model = args.model or await endpoint.first_model()
    gate = asyncio.Semaphore(args.concurrency or args.num_prompts)
    bodies = [body | {"model": model} for body in make_bodies(args)]
    rng = np.random.default_rng(args.seed)
    gaps = rng.exponential(1.0 / args.request_rate, len(bodies))
    path = "/v1/chat/completions" if args.chat else "/v1/completions"
    started = time.perf_counter()

    async def one(body: dict[str, Any], due: float) -> Trace:
        await asyncio.sleep(max(0.0, started + due - time.perf_counter()))
        async with gate:
            return await follow(endpoint, path, body)

    tasks = [one(body, float(due)) for body, due in zip(bodies, np.cumsum(gaps), strict=True)]
    traces = await asyncio.gather(*tasks)
    return traces, time.perf_counter() - started


def make_bodies(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The requests, without the model's name."""
    common = {
        "max_tokens": args.output_len,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if not args.chat:
        prompts = random_prompts(
            args.num_prompts, args.input_len, vocab_size=args.vocab_size, seed=args.seed
        )
        return [{"prompt": prompt, **common} for prompt in prompts]
    picks = np.random.default_rng(args.seed).integers(
        0, len(WORDS), (args.num_prompts, args.input_len)
    )
    texts = [" ".join(WORDS[i] for i in row) for row in picks]
    return [{"messages": [{"role": "user", "content": text}], **common} for text in texts]


async def follow(endpoint: Endpoint, path: str, body: dict[str, Any]) -> Trace:
    """Send one request and note when each piece of its stream arrives."""
    trace = Trace(sent=time.perf_counter())
    try:
        async for event in endpoint.events(path, body):
            for choice in event.get("choices", ()):
                piece = choice.get("text") or choice.get("delta", {}).get("content")
                if piece or choice.get("finish_reason"):
                    trace.arrivals.append(time.perf_counter())
            if usage := event.get("usage"):
                trace.tokens = usage.get("completion_tokens", 0)
                trace.prompt_tokens = usage.get("prompt_tokens", 0)
        trace.tokens = trace.tokens or len(trace.arrivals)
    except (HttpError, OSError, asyncio.IncompleteReadError) as error:
        trace.error = str(error)
    return trace


def summary(traces: Sequence[Trace], seconds: float) -> list[Row]:
    """The table's rows."""
    ttft = [1e3 * (t.arrivals[0] - t.sent) for t in traces]
    tpot = [1e3 * (t.arrivals[-1] - t.arrivals[0]) / (t.tokens - 1) for t in traces if t.tokens > 1]
    itl = [1e3 * gap for t in traces for gap in np.diff(t.arrivals)]
    e2e = [1e3 * (t.arrivals[-1] - t.sent) for t in traces]
    totals = {
        "requests/s": len(traces),
        "output tok/s": sum(t.tokens for t in traces),
        "total tok/s": sum(t.tokens + t.prompt_tokens for t in traces),
    }
    rows = [Row("all", name, Spread.of([amount / seconds]), 2) for name, amount in totals.items()]
    for name, samples in (("TTFT", ttft), ("TPOT", tpot), ("ITL", itl), ("E2E", e2e)):
        if samples:
            rows.append(Row("request", f"{name} ms", Spread.of(samples), 2))
            p99 = float(np.percentile(samples, 99))
            rows.append(Row("request", f"{name} ms p99", Spread.of([p99]), 2))
    return rows
