"""llguidance beside xgrammar: compiling schemas, and filling 64 masks, with two vocabularies.

Each library and vocabulary has a process of its own, and so has every schema that is meant to be
too much: it is ended after --limit seconds. xgrammar is no dependency; it is measured if it is
installed (`pip install xgrammar`, which brings torch).

example:
  octavo bench grammar --schemas jsonschema-4.26.0/json --tokenizers smollm2-135m ./qwen2
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from typing import Any, Protocol

import numpy as np

from octavo.bench.common import Row, Spread, report
from octavo.bench.schemas import nasty, suite
from octavo.engine.text.tokenizer import Tokenizer, load_tokenizer

MASKS = 64
STEPS = 50
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"type": "string"}},
        "scores": {"type": "object", "additionalProperties": {"type": "number"}},
    },
    "required": ["name", "age", "tags", "scores"],
}


class Library(Protocol):
    """What the two have in common."""

    def compile(self, schema: dict[str, Any]) -> Any: ...  # raises ValueError
    def matchers(self, compiled: Any, count: int) -> list[Any]: ...
    def fill(self, matchers: list[Any]) -> np.ndarray: ...  # u32[count, words]
    def advance(self, matcher: Any, token: int) -> bool: ...  # False: it ended


class LLGuidance:
    """As the engine uses it."""

    def __init__(self, tokenizer: Tokenizer, end: int) -> None:
        from octavo.engine.grammar.guide import Filler, Guide, compile_grammar
        from octavo.engine.grammar.vocabulary import Vocabulary

        self.vocabulary = Vocabulary.of(tokenizer, tokenizer.vocab_size, [end])
        self.tokenizer = self.vocabulary.open()
        self.filler = Filler(self.vocabulary.size)
        self._compile, self._guide = compile_grammar, Guide

    def compile(self, schema: dict[str, Any]) -> Any:
        from llguidance import LLMatcher

        return self._compile(self.tokenizer, LLMatcher.grammar_from_json_schema(schema))

    def matchers(self, compiled: Any, count: int) -> list[Any]:
        return [self._guide(compiled.deep_copy(), self.vocabulary.ends) for _ in range(count)]

    def fill(self, matchers: list[Any]) -> np.ndarray:
        masks = self.filler.fill(matchers)
        if broken := [m.broken for m in matchers if m.broken]:
            raise ValueError(broken[0])
        return masks

    def advance(self, matcher: Any, token: int) -> bool:
        return token not in matcher.ends and matcher.matcher.consume_token(token)


class XGrammar:
    """As its documentation has it for a batch."""

    def __init__(self, tokenizer: Tokenizer, end: int) -> None:
        import xgrammar

        self.x = xgrammar
        tokens = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
        self.size = len(tokens)
        info = xgrammar.TokenizerInfo(
            tokens,
            xgrammar.VocabType.RAW,
            vocab_size=self.size,
            stop_token_ids=[end],
        )
        self.compiler = xgrammar.GrammarCompiler(info, max_threads=2, cache_enabled=False)
        self.batch = xgrammar.BatchGrammarMatcher(max_threads=2)

    def compile(self, schema: dict[str, Any]) -> Any:
        try:
            return self.compiler.compile_json_schema(json.dumps(schema), strict_mode=False)
        except RuntimeError as error:
            raise ValueError(str(error)) from None

    def matchers(self, compiled: Any, count: int) -> list[Any]:
        return [self.x.GrammarMatcher(compiled) for _ in range(count)]

    def fill(self, matchers: list[Any]) -> np.ndarray:
        masks = self.x.allocate_token_bitmask(len(matchers), self.size)
        self.batch.batch_fill_next_token_bitmask(matchers, masks)
        return masks.numpy().view(np.uint32)

    def advance(self, matcher: Any, token: int) -> bool:
        return matcher.accept_token(token) and not matcher.is_terminated()


LIBRARIES: dict[str, Any] = {"llguidance": LLGuidance, "xgrammar": XGrammar}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """What to measure with."""
    parser.add_argument("--schemas", required=True, metavar="FOLDER", help="the test suite")
    parser.add_argument("--tokenizers", nargs="+", default=["smollm2-135m"], metavar="MODEL")
    parser.add_argument("--limit", type=float, default=20.0, metavar="SECONDS")


def run(args: argparse.Namespace) -> int:
    """Measure and print."""
    rows: list[Row] = []
    for library in LIBRARIES:
        if importlib.util.find_spec(library) is None:
            print(f"# {library} is not installed, and not measured")
            continue
        for model in args.tokenizers:
            got = _child(args, library, model, "suite", 900.0)
            size = f"{library}, {got['vocab']:,} tokens"
            for quantity in ("compile ms", "first mask ms", "64 masks ms", "slowest 64 ms"):
                rows.append(Row(size, quantity, Spread.of(got[quantity]), 2))
            rows.append(Row(size, "slowest compile ms", Spread.of([max(got["compile ms"])]), 1))
            rows.append(Row(size, "schemas refused", Spread.of([got["refused"]]), 0))
            rows.append(Row(size, "tokenizer s", Spread.of([got["load"]]), 2))
        for name, _ in nasty():
            got = _child(args, library, args.tokenizers[0], name, args.limit)
            says = f"{library}, {name}" + (f" ({got['error']})" if got.get("error") else "")
            rows.append(Row(says, "compile and 20 masks ms", Spread.of([got["ms"]]), 1))
    return report("grammar", {"limit": args.limit, "masks": MASKS}, rows, args)


def _child(
    args: argparse.Namespace, library: str, model: str, what: str, limit: float
) -> dict[str, Any]:
    order = {"library": library, "model": model, "what": what, "schemas": args.schemas}
    program = "from octavo.bench.grammar import child; child()"
    began = time.perf_counter()
    try:
        done = subprocess.run(
            [sys.executable, "-c", program, json.dumps(order)],
            capture_output=True,
            text=True,
            timeout=limit,
        )
    except subprocess.TimeoutExpired:
        return {"ms": 1000 * limit, "error": "ended, not done"}
    if done.returncode:
        return {"ms": 1000 * (time.perf_counter() - began), "error": f"exit {done.returncode}"}
    return dict(json.loads(done.stdout.splitlines()[-1]))


def child() -> None:
    """Measure one library with one vocabulary; prints one JSON object."""
    order = json.loads(sys.argv[1])
    tokenizer = load_tokenizer(order["model"])
    end = tokenizer.eos_id if tokenizer.eos_id is not None else 0
    began = time.perf_counter()
    library: Library = LIBRARIES[order["library"]](tokenizer, end)
    load = time.perf_counter() - began
    if order["what"] == "suite":
        out = _measure_suite(library, suite(order["schemas"]))
        out |= {"load": load, "vocab": tokenizer.vocab_size}
    else:
        out = _measure_one(library, dict(nasty())[order["what"]])
    print(json.dumps(out))


def _measure_suite(library: Library, schemas: list[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    compiling, first, refused = [], [], 0
    for _, schema in schemas:
        began = time.perf_counter()
        try:
            compiled = library.compile(schema)
            compiling.append(1e3 * (time.perf_counter() - began))
            [matcher] = library.matchers(compiled, 1)
            began = time.perf_counter()
            library.fill([matcher])
            first.append(1e3 * (time.perf_counter() - began))
        except ValueError:
            refused += 1
    runs = [_walk(library, library.compile(PERSON), MASKS, STEPS, seed) for seed in range(3)]
    steps = [1e3 * s for run in runs for s in run]
    return {
        "compile ms": compiling,
        "first mask ms": first,
        "64 masks ms": steps,
        "slowest 64 ms": [1e3 * max(run) for run in runs],
        "refused": refused,
    }


def _measure_one(library: Library, schema: dict[str, Any]) -> dict[str, Any]:
    began, error = time.perf_counter(), ""
    try:
        _walk(library, library.compile(schema), 1, 20, 0)
    except ValueError as problem:
        error = str(problem).split("\n")[0][:60]
    return {"ms": 1e3 * (time.perf_counter() - began), "error": error}


def _walk(library: Library, compiled: Any, count: int, steps: int, seed: int) -> list[float]:
    """Seconds of filling `count` masks at each of `steps` steps of random texts."""
    rng = np.random.default_rng(seed)
    matchers = library.matchers(compiled, count)
    seconds = []
    for _ in range(steps):
        began = time.perf_counter()
        masks = library.fill(matchers)
        seconds.append(time.perf_counter() - began)
        for i, mask in enumerate(masks):
            bits = np.unpackbits(np.ascontiguousarray(mask).view(np.uint8), bitorder="little")
            token = int(rng.choice(np.flatnonzero(bits)))
            if not library.advance(matchers[i], token):
                [matchers[i]] = library.matchers(compiled, 1)
    return seconds
