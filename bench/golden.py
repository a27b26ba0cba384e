"""Real weights on this device: golden rows in float32, and in bfloat16 every difference weighed.

examples:
  octavo bench golden smollm2-135m
  octavo bench golden SmolLM2-135M-Instruct.Q4_1.gguf --rows tests/golden/greedy.json

float32 with exact products must give the rows' own tokens. In bfloat16 the first other token of a
row must be one of a near tie: the rows' token is likely by less than 0.1 less. Nothing is fetched:
the model is a file or a package that is installed.
"""

import argparse
import gc
import json
from importlib import import_module
from pathlib import Path
from typing import Any

import octavo
from octavo.bench.common import Row, Spread, report

ROWS = Path(__file__).resolve().parent.parent / "tests" / "golden" / "greedy.json"
TIE = 0.1  # of two logits
# Small, so that few programs are compiled; pages for all of it.
SETTINGS: dict[str, Any] = dict(
    quiet=True, max_model_len=256, max_num_seqs=8, max_num_batched_tokens=128, num_pages=64
)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The model, where its rows are, and on what."""
    parser.add_argument("model", nargs="?", default="smollm2-135m", help="a name, file or folder")
    parser.add_argument("--rows", default=str(ROWS), help="the JSON file of golden rows")
    parser.add_argument("--name", default="smollm2-135m", help="the model's name in that file")
    parser.add_argument("--device", default="auto", help="as of octavo serve")


def run(args: argparse.Namespace) -> int:
    """Compare and print; 1 where a row is not explained."""
    rows = [row for row in json.loads(Path(args.rows).read_text()) if row["model"] == args.name]
    if not rows:
        print(f"{args.rows} has no rows of `{args.name}`")
        return 2
    table, wrong = [], 0
    for dtype in ("float32", "bfloat16"):
        found = answers(args.model, args.device, dtype, rows)
        for row, (tokens, likeliest) in zip(rows, found, strict=True):
            same, gap = verdict(row["output_ids"], tokens, likeliest)
            whole = same == len(row["output_ids"])
            wrong += not whole and (dtype == "float32" or gap >= TIE)
            name = f"{row['id']}, {dtype}"
            table.append(Row(name, f"equal of {len(row['output_ids'])}", Spread.of([same]), 0))
            if not whole:
                table.append(Row(name, "logit gap of the first other", Spread.of([gap]), 4))
    report("golden", {"rows": len(rows), "not explained": wrong}, table, args)
    return int(wrong > 0)


def answers(
    model: str, device: str, dtype: str, rows: list[dict[str, Any]]
) -> list[tuple[list[int], list[dict[int, float]]]]:
    """Each row's tokens, and for each of them the log probabilities of the likeliest two."""
    jax = import_module("jax")  # no sooner: --help is quick
    jax.config.update("jax_default_matmul_precision", "highest" if dtype == "float32" else None)
    out = []
    with octavo.LLM(model, device=device, dtype=dtype, **SETTINGS) as llm:
        for row in rows:
            params = octavo.SamplingParams(
                temperature=0, max_tokens=len(row["output_ids"]), logprobs=2
            )
            ask = llm.chat if "chat" in row else llm.generate
            [answer] = ask(row.get("chat") or row["prompt"], params, use_tqdm=False)
            one = answer.outputs[0]
            tops = [{t: p.logprob for t, p in step.items()} for step in one.logprobs or []]
            out.append((list(one.token_ids), tops))
    gc.collect()  # the next engine takes the device's memory
    return out


def verdict(want: list[int], got: list[int], tops: list[dict[int, float]]) -> tuple[int, float]:
    """How many tokens are equal from the beginning, and by how much less likely the wanted one was
    at the first other; infinity where it was not among the likeliest two."""
    same = next((i for i, (a, b) in enumerate(zip(want, got, strict=False)) if a != b), len(want))
    if same >= min(len(want), len(got)):
        return min(len(want), len(got)), 0.0 if len(got) >= len(want) else float("inf")
    step = tops[same]
    return same, step[got[same]] - step[want[same]] if want[same] in step else float("inf")
