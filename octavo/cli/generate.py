"""`octavo generate`: prompts in, text out, in this process."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from typing import Any

import octavo
from octavo.cli.options import (
    add_config_flags,
    add_form_flags,
    add_sampling_flags,
    config_from_args,
    form_from_args,
    sampling_from_args,
)
from octavo.engine.config import ConfigError

DESCRIPTION = """\
Continue one or more prompts and print the text.

examples:
  octavo generate smollm2-135m --prompt "The capital of France is" --temperature 0
  octavo generate smollm2-135m --chat --prompt "Name three rivers." --max-tokens 64
  octavo generate ./my-model --prompt - --json < prompt.txt
  octavo generate smollm2-135m --prompt "A person: " --json-schema person.json
"""


def register(subparsers: Any) -> None:
    """Add the command to the command line."""
    parser = subparsers.add_parser(
        "generate", help="continue a prompt and print the text", description=DESCRIPTION
    )
    add_config_flags(parser)
    parser.add_argument(
        "--prompt",
        action="append",
        default=[],
        metavar="TEXT",
        help="what to continue; - reads it from standard input; may be given several times",
    )
    parser.add_argument(
        "--chat", action="store_true", help="send each prompt as a user's message of a chat"
    )
    parser.add_argument("-n", type=int, default=1, metavar="N", help="completions per prompt")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object per prompt, with token ids"
    )
    add_sampling_flags(parser, max_tokens=128)
    add_form_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Generate and print."""
    prompts = [sys.stdin.read() if text == "-" else text for text in args.prompt]
    if not prompts:
        raise ConfigError("there is no prompt", 'give one: octavo generate MODEL --prompt "Hello"')
    config = config_from_args(args)
    sampling = sampling_from_args(args, n=args.n, structured_outputs=form_from_args(args))
    llm = octavo.LLM(**asdict(config))
    try:
        if args.chat:
            chats = [[{"role": "user", "content": text}] for text in prompts]
            outputs = llm.chat(chats, sampling, use_tqdm=False)
        else:
            outputs = llm.generate(prompts, sampling, use_tqdm=len(prompts) > 1)
    finally:
        llm.close()
    for output in outputs:
        if args.json:
            print(json.dumps(as_json(output), ensure_ascii=False))
        else:
            for completion in output.outputs:
                print(completion.text)
    return 0


def as_json(output: octavo.RequestOutput) -> dict[str, Any]:
    """One request's result with plain types only."""
    return {
        "prompt": output.prompt,
        "prompt_token_ids": list(output.prompt_token_ids or ()),
        "outputs": [
            {
                "index": completion.index,
                "text": completion.text,
                "token_ids": list(completion.token_ids),
                "finish_reason": completion.finish_reason,
            }
            for completion in output.outputs
        ],
    }
