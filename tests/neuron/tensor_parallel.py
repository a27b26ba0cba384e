"""Runs exported graphs of several ranks on as many virtual CPU devices; a program of its own.

python -m tests.neuron.tensor_parallel llama:2:drawn gemma3:8
"""

import os
import sys
from dataclasses import replace
from functools import cache
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import numpy as np

from octavo.backends.neuron import export
from octavo.backends.neuron.lint import check
from octavo.backends.neuron.record import record
from octavo.backends.neuron.targets import target_of
from octavo.backends.record import Backend
from octavo.backends.select import select
from octavo.engine.assemble import Parts, place_of
from octavo.engine.config import EngineConfig
from octavo.engine.core import EngineCore
from octavo.engine.memory import resolve
from octavo.engine.programs import Job
from octavo.models.config import ModelConfig
from octavo.models.load import load_params
from octavo.models.registry import Model, build
from octavo.models.tensors import shape
from tests.engine.tiny import GEMMA3, LLAMA, SIZES, run_one
from tests.neuron.on_cpu import QUICK, Ranks, load

# Of eight ranks, each has a copy of a key-value head.
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4}
MODELS: dict[str, dict[str, Any]] = {
    "llama": LLAMA | HEADS,
    "qwen3": SIZES | HEADS | {"architectures": ["Qwen3ForCausalLM"]},
    "gemma3": GEMMA3 | HEADS,
}
DRAWN: dict[str, Any] = {"temperature": 0.9, "top_k": 30, "top_p": 0.95, "min_p": 0.02, "seed": 7}
PROMPT = [3, 14, 15, 92, 65, 35, 89, 79, 32, 38]


def exported(ranks: int) -> Backend:
    """The Neuron record; programs are exported and run by the CPU client, every rank a device."""

    def compile(job: Job) -> Any:
        if not export.can_export(job):
            return lambda: jax.tree.map(lambda a: Ranks.put(a, None, ranks), job.function())

        @cache
        def program() -> Any:  # most are never called here
            graph = export.export_job(job, ranks)
            check(graph.exported, target_of("trn1"))
            return graph.call(load(graph.exported))

        return lambda *arguments: program()(*arguments)

    there = record(target_of("trn1"), "neuron graphs on the CPU")
    return replace(
        there,
        compile=compile,
        put=lambda array, axis=None: Ranks.put(array, axis, ranks),
        memory_limit=select("cpu").memory_limit,
    )


def lazy() -> Backend:
    """The CPU backend; what is not called is not compiled."""

    def compile(job: Job) -> Any:
        return jax.jit(job.function, donate_argnums=job.donate, compiler_options=QUICK)

    return replace(select("cpu"), compile=compile)


def checkpoint(model: Model) -> dict[str, np.ndarray]:
    """Random tensors by their names, the same however the model is cut."""
    pieces = [piece for t in jax.tree.leaves(model.tensors) for piece in t.pieces]
    made = {}
    for piece in pieces:
        dims = shape(piece.whole or piece.axes, model.config.sizes)
        random = np.random.default_rng(list(piece.name.encode()))
        made[piece.name] = random.standard_normal(dims, np.float32) * dims[-1] ** -0.5
    return made


def texts(
    facts: dict[str, Any], backend: Backend, mesh: str, ways: list[dict[str, Any]]
) -> list[list[int]]:
    """64 tokens each way, of random weights that depend on the model alone."""
    config = EngineConfig(
        mesh=mesh,
        dtype="float32",
        max_num_seqs=1,
        max_num_batched_tokens=16,
        page_size=8,
        num_pages=40,
        max_logprobs=2,
        compilation_cache="none",
    )
    resolved = resolve(config, backend, ModelConfig.from_hf(facts))
    place = place_of(backend, resolved)
    stored = checkpoint(build(ModelConfig.from_hf(facts), resolved.max_model_len))
    params = load_params(resolved.model, stored.__getitem__, stored, "float32", place.put_weight)
    core = EngineCore(config, parts=Parts(backend, resolved, params, [], 0.0))
    written = [run_one(core, PROMPT, max_tokens=64, **how) for how in ways]
    core.close()
    return written


def main() -> None:
    """Print one line for each MODEL:RANKS[:drawn] of the command line that writes the CPU's text:
    greedy, and then drawn."""
    for word in sys.argv[1:]:
        name, ranks, *drawn = word.split(":")
        ways = [{}, DRAWN] if drawn else [{}]
        there = texts(MODELS[name], exported(int(ranks)), f"model={ranks}", ways)
        here = texts(MODELS[name], lazy(), "", ways)
        assert there == here and all(len(text) == 64 for text in there), (word, there, here)
        print(word, "equal")


if __name__ == "__main__":
    main()
