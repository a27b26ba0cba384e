"""From a function of the step to the module that the compiler gets: trace, lower, make safe.

Leaves have names, which are those of the engine's trees: "params.layers[0].mlp.down.weight",
"state.kv[3].k", "vector". A leaf of the state that a graph leaves as it is is neither among its
inputs nor among its outputs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax

from octavo.backends.neuron.exported import Exported
from octavo.backends.neuron.safe import make_safe


@dataclass(frozen=True)
class Signature:
    """A function's arguments and results by name."""

    name: str
    arguments: tuple[str, ...]  # the root of each argument: "params", "state.slots"
    results: tuple[str, ...]  # the root of each element of what it returns


@dataclass(frozen=True)
class Graph:
    """An exported graph, and how it is called with trees."""

    exported: Exported
    signature: Signature
    outputs: tuple[str, ...]  # the name of every leaf that the function returns
    structure: Any  # their tree

    def call(self, run: Callable[[list[Any]], Sequence[Any]]) -> Callable[..., Any]:
        """The function again: run(inputs in the order of the graph) -> its outputs.

        Leaves may be anything that stands for a tensor.
        """

        def function(*arguments: Any) -> Any:
            held = dict(name_leaves(self.signature.arguments, arguments))
            made = run([held[tensor.leaf] for tensor in self.exported.inputs])
            for tensor, leaf in zip(self.exported.outputs, made, strict=True):
                held[tensor.leaf] = leaf
            return jax.tree.unflatten(self.structure, [held[name] for name in self.outputs])

        return function


def name_leaves(roots: Sequence[str], trees: Sequence[Any]) -> list[tuple[str, Any]]:
    """(name, leaf) of every leaf, in jax's order."""
    named = []
    for root, tree in zip(roots, trees, strict=True):
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            named.append((root + jax.tree_util.keystr(path), leaf))
    return named


class Job(Protocol):
    """A program of the step (`engine.programs.Job` is one)."""

    @property
    def name(self) -> str: ...
    @property
    def function(self) -> Callable[..., Any]: ...
    @property
    def arguments(self) -> tuple[Any, ...]: ...  # abstract
    @property
    def donate(self) -> tuple[int, ...]: ...


SAMPLE = (("params", "state.slots", "passed", "mask", "named"), ("state.slots", "packed", "extra"))
# By the first word of a job's name: the roots of its arguments and of its results. A job with fewer
# arguments or results has the first of them.
ROOTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "edit": (("state.slots", "state.pages", "vector"), ("state.slots", "state.pages")),
    "forward": (("params", "state", "vector"), ("state", "passed", "taken")),
    "score": (("params", "hidden", "targets", "named"), tuple(f"scores[{i}]" for i in range(5))),
    **dict.fromkeys(("greedy", "sample", "masked", "rich"), SAMPLE),
}


def can_export(job: Job) -> bool:
    """Whether it is a graph: what makes the first, empty state is none."""
    return job.name.split()[0] in ROOTS


def export_job(job: Job, ranks: int = 1) -> Graph:
    """The graph of one of the step's programs."""
    arguments, results = ROOTS[job.name.split()[0]]
    name = job.name.replace(" + ", " ").replace(" ", "_")
    signature = Signature(name, arguments[: len(job.arguments)], results)
    return export(job.function, job.arguments, signature, donate=job.donate, ranks=ranks)


def export(
    function: Callable[..., Any],
    arguments: Sequence[Any],
    signature: Signature,
    *,
    donate: Sequence[int] = (),
    ranks: int = 1,
) -> Graph:
    """Trace `function` with abstract arguments and make its module safe.

    Where it is one shard_map over `ranks` devices, the module is that of one rank.
    """
    jitted = jax.jit(function, donate_argnums=tuple(donate), keep_unused=True)
    traced = jitted.trace(*arguments)
    lowered = traced.lower(lowering_platforms=("cpu",))
    data = lowered.compiler_ir("hlo").as_serialized_hlo_module_proto()
    inputs = [name for name, _ in name_leaves(signature.arguments, arguments)]
    results = traced.out_info
    single = len(signature.results) == 1
    trees = (results,) if single else tuple(results)
    outputs = [name for name, _ in name_leaves(signature.results[: len(trees)], trees)]
    safe = make_safe(data, signature.name, inputs, outputs)
    exported = Exported(
        name=signature.name,
        hlo=safe.module.encode(),
        inputs=safe.inputs,
        outputs=safe.outputs,
        aliases=tuple(safe.module.aliases),
        ranks=ranks,
    )
    return Graph(exported, signature, tuple(outputs), jax.tree.structure(results))
