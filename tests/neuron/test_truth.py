"""What neuronx-cc would get is right: the exported bytes drive the engine, and give the CPU's text.

Every program of the step is exported, linted, and its bytes run by XLA's CPU client in place of the
program. That proves what the graphs compute; what Amazon's compiler and cores make of them, only an
instance shows (`octavo doctor neuron`).
"""

from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import jax
import numpy as np
import pytest

from octavo.backends.neuron import export
from octavo.backends.neuron.lint import check
from octavo.backends.neuron.record import record
from octavo.backends.neuron.targets import target_of
from octavo.backends.record import Backend
from octavo.backends.select import select
from octavo.engine.assemble import Parts, load_weights, open_model, place_of
from octavo.engine.config import EngineConfig
from octavo.engine.core import EngineCore
from octavo.engine.grammar.compiler import Compiler
from octavo.engine.memory import resolve
from octavo.engine.programs import Job
from octavo.models.config import ModelConfig
from tests.e2e.golden import COMPLETION, need
from tests.engine.grammar.words import VOCABULARY
from tests.engine.tiny import GEMMA3, LLAMA, SIZES, Client, make_engine, make_parts, run_one
from tests.neuron.on_cpu import QUICK, load

# Llama has two layers; what differs in the others shows in one.
ONE = SIZES | {"num_hidden_layers": 1}
QWEN3 = ONE | {"architectures": ["Qwen3ForCausalLM"]}
MIXTRAL = ONE | {
    "architectures": ["MixtralForCausalLM"],
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
SETTINGS: dict[str, Any] = {
    "max_num_seqs": 3,
    "max_num_batched_tokens": 32,
    "page_size": 8,
    "num_pages": 100,
    "dtype": "float32",
    "max_logprobs": 3,
}


PROMPTS = [np.random.default_rng(3).integers(6, 128, size).tolist() for size in (3, 50, 17)]
AB = "start: /[ab]{130,140}/"  # at most two letters a token
# By the program that samples: how each of the prompts is continued.
WAYS: dict[str, list[dict[str, Any]]] = {
    "greedy": [{}, {}, {}],
    "sample": [
        {"temperature": 0.9, "top_k": 20, "seed": 1},
        {"temperature": 1.2, "top_p": 0.8, "seed": 2, "repetition_penalty": 1.2},
        {"temperature": 1.0, "min_p": 0.05, "seed": 3, "logit_bias": {7: 3.0}},
    ],
    "masked": [{"grammar": AB, "temperature": 1.0, "seed": 4}, {"grammar": AB}, {}],
    "rich": [{"logprobs": 3}, {"logprobs": 1, "grammar": AB}, {"temperature": 0.7, "seed": 5}],
}


def exported_backend(_: Backend) -> Backend:
    """The Neuron record, its programs exported and run by the CPU client."""

    def compile(job: Job) -> Any:
        if not export.can_export(job):
            return job.function

        @cache
        def program() -> Any:  # most are never called here
            graph = export.export_job(job)
            check(graph.exported, target_of("inf2"))
            return graph.call(load(graph.exported))

        return lambda *arguments: program()(*arguments)

    there = record(target_of("inf2"), "neuron graphs on the CPU", select("cpu").devices)
    return replace(
        there,
        compile=compile,
        row_buckets=lambda most: (most,),
        context_buckets=lambda pages: (8, pages),
    )


def lazy_backend(backend: Backend) -> Backend:
    """The CPU backend; what is not called is not compiled."""

    def compile(job: Job) -> Any:
        return jax.jit(job.function, donate_argnums=job.donate, compiler_options=QUICK)

    return replace(backend, compile=compile)


@dataclass
class Texts:
    """What an engine wrote."""

    tokens: dict[str, list[list[int]]]  # by way, 64 each
    likeliest: list[list[int]]  # beside the tokens, where that was asked for
    logprobs: np.ndarray


def texts(parts: Parts, ways: Iterable[str]) -> Texts:
    """The prompts' texts, one way after another; one prompt is longer than a chunk."""
    core = make_engine(parts)
    core.grammars = Compiler(lambda: VOCABULARY)
    written = Texts({}, [], np.zeros(0, np.float32))
    for way in ways:
        client = Client(core)
        asked = zip(PROMPTS, WAYS[way], strict=True)
        handles = [client.add(prompt, max_tokens=64, **how) for prompt, how in asked]
        client.drain()
        assert all(client.finished[h].reason == "length" for h in handles), client.finished
        written.tokens[way] = [client.tokens[h] for h in handles]
        rows = [row for h in sorted(client.logprobs) for row in client.logprobs[h]]
        written.likeliest += [np.frombuffer(row.tokens, np.int32).tolist() for row in rows]
        values = [np.frombuffer(row.logprobs, np.float32) for row in rows]
        written.logprobs = np.concatenate([written.logprobs, *values])
    core.close()
    core.grammars.close()
    return written


def smollm2(backend: Backend) -> list[int]:
    """64 tokens of SmolLM2 in float32."""
    config = EngineConfig(
        model="smollm2-135m",
        dtype="float32",
        max_model_len=128,
        max_num_seqs=1,
        max_num_batched_tokens=32,
        page_size=16,
        num_pages=12,
        max_logprobs=3,
        compilation_cache="none",
    )
    with closing(open_model(config)) as checkpoint:
        resolved = resolve(config, backend, ModelConfig.from_hf(checkpoint.config))
        params = load_weights(config, checkpoint, place_of(backend, resolved), resolved.dtype)
    core = EngineCore(config, parts=Parts(backend, resolved, params, [], 0.0))
    tokens = run_one(core, COMPLETION.input_ids, max_tokens=64)
    core.close()
    return tokens


def test_the_exported_bytes_of_smollm2_write_the_golden_text() -> None:
    need("smollm2-135m")
    there = smollm2(exported_backend(select("cpu")))
    assert there[: len(COMPLETION.output_ids)] == COMPLETION.output_ids
    assert there == smollm2(lazy_backend(select("cpu"))) and len(there) == 64


@pytest.mark.parametrize(
    "facts, ways",
    [
        (LLAMA, tuple(WAYS)),
        (QWEN3, ("greedy",)),
        (GEMMA3, ("greedy",)),
        (MIXTRAL, ("greedy",)),
    ],
    ids=lambda value: value["architectures"][0] if isinstance(value, dict) else " ".join(value),
)
def test_the_exported_bytes_write_what_the_cpu_backend_writes(
    facts: dict[str, Any], ways: tuple[str, ...]
) -> None:
    there = texts(make_parts(facts, backend=exported_backend, **SETTINGS), ways)
    here = texts(make_parts(facts, backend=lazy_backend, **SETTINGS), ways)
    assert there.tokens == here.tokens
    assert there.likeliest == here.likeliest and len(there.likeliest) >= 128 * ("rich" in ways)
    np.testing.assert_allclose(there.logprobs, here.logprobs, atol=2e-4)
    assert all(len(text) == 64 for way in ways for text in there.tokens[way])
