"""What throughput and latency share: an LLM, prompts of random tokens, timed rounds."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import octavo
from octavo.bench.common import random_prompts
from octavo.cli.options import add_config_flags, config_from_args


def add_offline_flags(
    parser: argparse.ArgumentParser, *, input_len: int, output_len: int, num_prompts: int
) -> None:
    """The engine's flags and the shape of the work."""
    add_config_flags(parser)
    for name, default, help in (
        ("input-len", input_len, "tokens per prompt"),
        ("output-len", output_len, "tokens generated per prompt"),
        ("num-prompts", num_prompts, "prompts in one round"),
        ("rounds", 5, "timed rounds, after one that is not timed"),
    ):
        parser.add_argument(
            f"--{name}", type=int, default=default, metavar="N", help=f"{help} (default: {default})"
        )
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="X", help="0 is greedy (default: 0)"
    )


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What the header line says of the work."""
    config = config_from_args(args)
    shape = ("num_prompts", "input_len", "output_len", "rounds", "temperature")
    return {"model": config.model, **{k: getattr(args, k) for k in shape}, **config.overrides()}


def timed_rounds(args: argparse.Namespace) -> list[float]:
    """Seconds of each timed round; every round has prompts of its own, so no prefix is shared."""
    sampling = octavo.SamplingParams(
        temperature=args.temperature, max_tokens=args.output_len, ignore_eos=True
    )
    seconds = []
    with engine(args) as llm:
        for number in range(args.rounds + 1):
            prompts = random_prompts(
                args.num_prompts, args.input_len, vocab_size=llm.vocab_size, seed=number
            )
            started = time.perf_counter()
            outputs = llm.generate(
                [{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False
            )
            seconds.append(time.perf_counter() - started)
            made = sum(len(output.outputs[0].token_ids) for output in outputs)
            assert made == args.num_prompts * args.output_len, f"{made=}"
    return seconds[1:]


@contextmanager
def engine(args: argparse.Namespace) -> Iterator[octavo.LLM]:
    """An LLM from the flags, closed at the end."""
    llm = octavo.LLM(**asdict(config_from_args(args)))
    try:
        yield llm
    finally:
        llm.close()
