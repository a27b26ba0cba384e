"""How many texts per second a reading model embeds, beside torch in turns where --torch is given.

Texts are random tokens of random lengths, ready before the clock starts. The other side is the same
checkpoint in transformers, as sentence-transformers drives it: texts sorted by length, batches of
32 padded to their longest, the same threads. Both need float32, and their vectors are compared.

example:
  octavo bench embed all-minilm-l6-v2 --torch
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib import import_module
from typing import Any

import numpy as np

import octavo
from octavo.bench.common import Row, Spread, report
from octavo.cli.options import add_config_flags, config_from_args
from octavo.engine.config import ConfigError, EngineConfig
from octavo.models.checkpoint import locate

BATCH = 32  # sentence-transformers' default
CLOSE = 0.9999  # the least cosine between the two sides' vectors of one text

Embed = Callable[[Sequence[list[int]]], np.ndarray]


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The engine's flags and the shape of the work."""
    add_config_flags(parser)
    for name, default, help in (
        ("num-texts", 512, "texts in one round"),
        ("shortest", 4, "tokens of the shortest text"),
        ("longest", 128, "tokens of the longest text"),
        ("rounds", 5, "timed rounds, after one that is not timed"),
    ):
        parser.add_argument(
            f"--{name}", type=int, default=default, metavar="N", help=f"{help} (default: {default})"
        )
    parser.add_argument("--torch", action="store_true", help="measure transformers beside it")


def run(args: argparse.Namespace) -> int:
    """Measure and print."""
    config = config_from_args(args)
    with octavo.LLM(**asdict(config), quiet=True) as llm:
        sides: dict[str, Embed] = {"octavo": lambda texts: llm.encode(texts)}
        if args.torch:
            sides["torch"] = torch_side(config)
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for number in range(args.rounds + 1):
            texts = made_up(args, llm.vocab_size, number)
            found = {}
            for name, embed in sides.items():  # in turns: a slow minute of the machine hits both
                began = time.perf_counter()
                found[name] = embed(texts)
                seconds[name].append(time.perf_counter() - began)
            check(found)
            tokens = sum(map(len, texts))
    shape = ("num_texts", "shortest", "longest", "rounds")
    about = {"model": config.model, "tokens": tokens, **{k: getattr(args, k) for k in shape}}
    rows = [
        Row(name, quantity, Spread.of([amount / s for s in times[1:]]), 0)
        for name, times in seconds.items()
        for quantity, amount in (("texts/s", args.num_texts), ("tokens/s", tokens))
    ]
    if args.torch:
        times = zip(seconds["torch"][1:], seconds["octavo"][1:], strict=True)
        rows.append(Row("octavo", "times torch", Spread.of([a / b for a, b in times]), 2))
    return report("embed", {**about, **config.overrides()}, rows, args)


def made_up(args: argparse.Namespace, vocab: int, seed: int) -> list[list[int]]:
    """Texts of random tokens and lengths."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(args.shortest, args.longest + 1, args.num_texts)
    return [rng.integers(min(1000, vocab - 1), vocab, n).tolist() for n in lengths]


def check(found: dict[str, np.ndarray]) -> None:
    """Both sides computed the same vectors."""
    if len(found) > 1:
        least = float((found["octavo"] * found["torch"]).sum(1).min())
        assert least > CLOSE, f"{least=}"


def torch_side(config: EngineConfig) -> Embed:
    """Mean pooling and length 1 over transformers' model: what MiniLM's own files say."""
    try:
        torch, transformers = import_module("torch"), import_module("transformers")
    except ImportError:
        raise ConfigError("--torch needs torch", "pip install torch") from None
    model = transformers.AutoModel.from_pretrained(str(locate(config.model))).eval()

    def embed(texts: Sequence[list[int]]) -> np.ndarray:
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        rows: Any = [None] * len(texts)
        with torch.inference_mode():
            for at in range(0, len(order), BATCH):
                some = order[at : at + BATCH]
                width = len(texts[some[0]])
                ids = torch.tensor([texts[i] + [0] * (width - len(texts[i])) for i in some])
                lengths = torch.tensor([len(texts[i]) for i in some])[:, None]
                mask = (torch.arange(width) < lengths).long()
                hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
                mean = (hidden * mask[:, :, None]).sum(1) / lengths
                unit = torch.nn.functional.normalize(mean, dim=1).numpy()
                for i, row in zip(some, unit, strict=True):
                    rows[i] = row
        return np.stack(rows)

    return embed
