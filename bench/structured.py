"""Whether every text that a schema ruled parses and validates, over the JSON-Schema test suite.

Every schema of the suite is compiled; those that are refused are listed with the reason. The others
rule generations at temperature 1, each with a seed of its own. A text that ends by itself must
parse, and validate with the package jsonschema, which had no part in making it; one that was cut
off at --max-tokens must be the beginning of one, which is not checked.

example (see bench/schemas.py for the suite):
  octavo bench structured smollm2-135m --schemas jsonschema-4.26.0/json --generations 1000
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
from collections import Counter
from dataclasses import asdict, dataclass, field
from importlib import import_module
from typing import Any

import octavo
from octavo.bench.common import machine
from octavo.bench.schemas import suite
from octavo.cli.options import add_config_flags, config_from_args
from octavo.engine.config import ConfigError
from octavo.engine.sampling_params import (
    ParameterError,
    RequestOutputKind,
    SamplingParams,
    StructuredOutputsParams,
)

# Examples of short values: a model of this size rarely finds the end of a long text.
PROMPT = """Short JSON values, one a line:
7
"ab"
{"a": true}
[2, null]
"cd"
-1.5
{"foo": 1, "bar": "x"}
["a", {}]
"""
Schema = tuple[str, dict[str, Any]]


@dataclass
class Tally:
    """What became of the schemas and of the texts."""

    schemas: int = 0
    refused: dict[str, str] = field(default_factory=dict)  # by the schema's name, why
    texts: int = 0
    ended: int = 0
    cut: int = 0
    failed: list[str] = field(default_factory=list)  # the request ended with an error
    invalid: list[str] = field(default_factory=list)
    unjudged: list[str] = field(default_factory=list)  # parsed; jsonschema cannot read the schema
    tokens: int = 0


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The suite, the model and how much of it."""
    add_config_flags(parser)
    parser.add_argument("--schemas", required=True, metavar="FOLDER", help="the test suite")
    parser.add_argument("--generations", type=int, default=1000, metavar="N")
    parser.add_argument("--max-tokens", type=int, default=96, metavar="N")
    parser.add_argument("--temperature", type=float, default=1.0, metavar="T")


def run(args: argparse.Namespace) -> int:
    """Generate, check, print; 1 where a text was wrong."""
    try:
        import_module("jsonschema")
    except ImportError:
        raise ConfigError("jsonschema is not installed", "pip install jsonschema") from None
    config = config_from_args(args)
    tally = asyncio.run(_run(args, asdict(config)))
    if args.json:
        print(json.dumps({"bench": "structured", "machine": machine(), **asdict(tally)}))
    else:
        _print(tally)
    return 1 if tally.invalid else 0


async def _run(args: argparse.Namespace, settings: dict[str, Any]) -> Tally:
    schemas = suite(args.schemas)
    tally = Tally(schemas=len(schemas))
    async with octavo.AsyncLLM(**settings) as llm:
        compiled = []
        for name, schema in schemas:
            try:
                await llm.check(StructuredOutputsParams(json=schema))
                compiled.append((name, schema))
            except ParameterError as error:
                tally.refused[name] = error.problem
        jobs = [
            _one(llm, compiled[seed % len(compiled)], seed, args, tally)
            for seed in range(args.generations)
        ]
        await asyncio.gather(*jobs)
    return tally


async def _one(
    llm: octavo.AsyncLLM, named: Schema, seed: int, args: argparse.Namespace, tally: Tally
) -> None:
    name, schema = named
    sampling = SamplingParams(
        temperature=args.temperature,
        seed=seed,
        max_tokens=args.max_tokens,
        structured_outputs=StructuredOutputsParams(json=schema),
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    tally.texts += 1
    try:
        output = [o async for o in llm.generate(PROMPT, sampling)][-1].outputs[0]
    except RuntimeError as error:
        tally.failed.append(f"{name}: {error}")
        return
    tally.tokens += len(output.token_ids)
    if output.finish_reason != "stop":
        tally.cut += 1
        return
    tally.ended += 1
    try:
        problem = problem_of(output.text, schema)
    except re.error as error:  # Python's `re` has no \p{Letter}
        tally.unjudged.append(f"{name}: {error}")
        return
    if problem:
        tally.invalid.append(f"{name} (seed {seed}): {problem} in {output.text!r}")


def problem_of(text: str, schema: dict[str, Any]) -> str:
    """Why `text` is no instance of the schema; empty where it is one."""
    import jsonschema

    validator = jsonschema.validators.validator_for(schema)
    try:
        value = json.loads(text)
    except ValueError as error:
        return f"not JSON ({error})"
    worst = jsonschema.exceptions.best_match(validator(as_ecma(schema)).iter_errors(value))
    return "" if worst is None else str(worst.message)


def as_ecma(schema: Any) -> Any:
    """A copy whose patterns mean to Python what they mean to JavaScript."""
    if isinstance(schema, list):
        return [as_ecma(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    out = {key: as_ecma(value) for key, value in schema.items()}
    if isinstance(schema.get("pattern"), str):
        out["pattern"] = _ascii(schema["pattern"])
    if isinstance(schema.get("patternProperties"), dict):
        out["patternProperties"] = {_ascii(k): v for k, v in out["patternProperties"].items()}
    return out


def _ascii(pattern: str) -> str:
    classes = {"d": "[0-9]", "D": "[^0-9]", "w": "[0-9A-Za-z_]", "W": "[^0-9A-Za-z_]"}
    return re.sub(r"\\([dDwW])", lambda found: classes[found[1]], pattern)


def _lists(tally: Tally) -> list[tuple[str, list[str]]]:
    return [("invalid", tally.invalid), ("failed", tally.failed), ("unjudged", tally.unjudged)]


def _print(tally: Tally) -> None:
    about = machine()
    print(f"# structured  {about['processor']} x {about['cores']}  commit {about['commit']}")
    print(f"schemas      {tally.schemas}, {len(tally.refused)} refused")
    print(f"texts        {tally.texts}, {tally.tokens:,} tokens")
    print(f"ended        {tally.ended}, {len(tally.invalid)} of them invalid")
    print(
        f"             {len(tally.unjudged)} of them parsed, with a schema jsonschema cannot read"
    )
    print(f"cut off      {tally.cut}")
    print(f"failed       {len(tally.failed)}")
    for title, lines in _lists(tally):
        for line in lines:
            print(f"{title}: {line}")
    print("refused, by reason:")
    for reason, count in Counter(tally.refused.values()).most_common():
        print(f"  {count:4d}  {reason}")
    for name, reason in tally.refused.items():
        print(f"refused: {name}: {reason}")
