"""`octavo chat`: talk to a model, in this process or on a server."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict
from typing import Any

import octavo
from octavo.cli.client import Endpoint, HttpError
from octavo.cli.options import (
    add_config_flags,
    add_sampling_flags,
    config_from_args,
    sampling_from_args,
    sampling_values,
)
from octavo.engine.config import ConfigError

DESCRIPTION = """\
Talk to a model. The answer appears as it is written; Ctrl-C stops an answer.

examples:
  octavo chat smollm2-135m
  octavo chat --url http://localhost:8000
  octavo chat smollm2-135m --system "Answer in one sentence." --temperature 0

in the chat:  /reset forgets the conversation   /exit or Ctrl-D ends it
"""

Message = dict[str, str]
# Prints the answer to a conversation as it comes, and returns it.
Answer = Callable[[list[Message]], str]


def register(subparsers: Any) -> None:
    """Add the command to the command line."""
    parser = subparsers.add_parser("chat", help="talk to a model", description=DESCRIPTION)
    parser.add_argument("--url", help="talk to this server instead of loading a model here")
    parser.add_argument("--api-key", default="", help="the server's key")
    parser.add_argument("--system", default="", metavar="TEXT", help="what the model is told first")
    add_config_flags(parser)
    add_sampling_flags(parser, max_tokens=1024)


def run(args: argparse.Namespace) -> int:
    """Read, answer, repeat."""
    if args.url:
        return converse(remote(args), args.system)
    config = config_from_args(args)
    sampling = sampling_from_args(args)
    with closing(octavo.LLM(**asdict(config))) as llm:
        return converse(local(llm, sampling), args.system)


def converse(answer: Answer, system: str) -> int:
    """The conversation loop, on standard input and output."""
    start: list[Message] = [{"role": "system", "content": system}] if system else []
    messages = list(start)
    interactive = sys.stdin.isatty()
    while True:
        try:
            text = input("> " if interactive else "").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return 0
        if text == "/exit":
            return 0
        if text == "/reset":
            messages = list(start)
        elif text:
            messages.append({"role": "user", "content": text})
            try:
                reply = answer(messages)
            except HttpError as error:
                print(f"error: {error}", file=sys.stderr)
                messages.pop()
                continue
            messages.append({"role": "assistant", "content": reply})


def emit(text: str) -> None:
    """Print a piece of an answer at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def local(llm: octavo.LLM, sampling: octavo.SamplingParams) -> Answer:
    """Answers from a model in this process."""

    def answer(messages: list[Message]) -> str:
        said: list[str] = []
        outputs = llm.stream(messages, sampling)
        try:
            for output in outputs:
                piece = output.outputs[0].text
                emit(piece)
                said.append(piece)
        except KeyboardInterrupt:  # the stream ends with this frame, which aborts the request
            pass
        emit("\n")
        return "".join(said)

    return answer


def remote(args: argparse.Namespace) -> Answer:
    """Answers from a server."""
    endpoint = Endpoint.parse(args.url, args.api_key)
    model = args.positional_model or getattr(args, "model", "")

    async def stream(messages: list[Message], said: list[str]) -> None:
        body = {
            "model": model or await endpoint.first_model(),
            "messages": messages,
            "stream": True,
            **sampling_values(args),
        }
        async for event in endpoint.events("/v1/chat/completions", body):
            for choice in event["choices"]:
                piece = choice["delta"].get("content") or ""
                emit(piece)
                said.append(piece)

    def answer(messages: list[Message]) -> str:
        said: list[str] = []
        try:
            asyncio.run(stream(messages, said))
        except KeyboardInterrupt:  # the connection is closed, which stops the request there
            pass
        except ConnectionError as error:
            raise ConfigError(f"{endpoint} went away: {error}", "is the server running?") from None
        emit("\n")
        return "".join(said)

    return answer
