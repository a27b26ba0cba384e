"""`octavo run-batch`: OpenAI's batch format, a file in and a file out."""

import argparse
import asyncio
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.progress import Progress

from octavo.cli.client import Endpoint, HttpError
from octavo.cli.local_server import local_server
from octavo.cli.options import add_config_flags, config_from_args
from octavo.engine.config import ConfigError

DESCRIPTION = """\
Answer every line of a batch file. A line is one request, as OpenAI's batch API has it:
  {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": [...]}}
The answers have the same form as there, one line each, in the order of the input. A request that is
refused gives a line with its error; the others go on.

examples:
  octavo run-batch smollm2-135m --input in.jsonl --output out.jsonl
  octavo run-batch --url http://localhost:8000 -i in.jsonl -o out.jsonl --concurrency 64
"""


def register(subparsers: Any) -> None:
    """Add the command to the command line."""
    parser = subparsers.add_parser(
        "run-batch",
        help="answer a file of requests",
        description=DESCRIPTION,
        usage="%(prog)s [MODEL] -i FILE.jsonl -o FILE.jsonl [flags]",
    )
    parser.add_argument("-i", "--input", required=True, metavar="FILE.jsonl", help="the requests")
    parser.add_argument("-o", "--output", required=True, metavar="FILE.jsonl", help="the answers")
    parser.add_argument("--url", help="ask this server instead of loading a model here")
    parser.add_argument("--api-key", default="", help="the server's key")
    parser.add_argument(
        "--concurrency", type=int, default=256, metavar="N", help="requests at once (default: 256)"
    )
    add_config_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Answer the file; 1 if any request was refused."""
    if args.concurrency < 1:
        raise ConfigError(f"`concurrency` must be at least 1, got {args.concurrency}")
    lines = read_requests(Path(args.input))
    if args.url:
        answers = answer_all(Endpoint.parse(args.url, args.api_key), lines, args.concurrency)
    else:
        with local_server(config_from_args(args)) as endpoint:
            answers = answer_all(endpoint, lines, args.concurrency)
    with Path(args.output).open("w", encoding="utf-8") as out:
        for answer in answers:
            out.write(json.dumps(answer, ensure_ascii=False) + "\n")
    refused = sum(answer["error"] is not None for answer in answers)
    print(f"{len(answers)} answers in {args.output}, {refused} of them errors", file=sys.stderr)
    return 1 if refused else 0


def read_requests(path: Path) -> list[dict[str, Any]]:
    """The requests of a batch file; ConfigError names the first line that is none."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {(error.strerror or str(error)).lower()}") from None
    requests = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            request = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{path}, line {number} is not JSON: {error}") from None
        missing = [key for key in ("custom_id", "url", "body") if key not in request]
        if missing:
            raise ConfigError(
                f"{path}, line {number} has no `{missing[0]}`",
                "a line needs custom_id, method, url and body",
            )
        requests.append(request)
    return requests


def answer_all(
    endpoint: Endpoint, requests: list[dict[str, Any]], concurrency: int
) -> list[dict[str, Any]]:
    """Every request's answer, in order, at most `concurrency` at once; shows a progress bar."""
    with Progress(transient=True, disable=not sys.stderr.isatty()) as progress:
        bar = progress.add_task("requests", total=len(requests))
        return asyncio.run(
            _answer_all(endpoint, requests, concurrency, lambda: progress.advance(bar))
        )


async def _answer_all(
    endpoint: Endpoint,
    requests: list[dict[str, Any]],
    concurrency: int,
    done: Callable[[], None],
) -> list[dict[str, Any]]:
    model = await endpoint.first_model()
    gate = asyncio.Semaphore(concurrency)

    async def one(index: int, request: dict[str, Any]) -> dict[str, Any]:
        async with gate:
            body = {"model": model, **request["body"], "stream": False}
            answer: dict[str, Any] = {
                "id": f"batch_req_{index}",
                "custom_id": request["custom_id"],
                "response": None,
                "error": None,
            }
            try:
                result = await endpoint.fetch("POST", request["url"], body)
                answer["response"] = {
                    "status_code": 200,
                    "request_id": str(result.get("id", "")),
                    "body": result,
                }
            except HttpError as error:
                answer["error"] = {"code": str(error.status), "message": str(error)}
            done()
            return answer

    return await asyncio.gather(*(one(i, request) for i, request in enumerate(requests)))
