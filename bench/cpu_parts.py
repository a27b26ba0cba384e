"""What the parts of a step cost on this processor, in the shapes of SmolLM2-135M (float32).

    python -m octavo.bench.cpu_parts [--rows 1 8 32] [--prompt 512] [--rounds 10] [--json]

    projections    the four matmuls of each of 30 layers, weights [in, out] as Octavo stores them
    ... [out, in]  the same with the weights stored the other way round, for comparison
    head           hidden states to logits, the weight is the embedding [V, E]
    attention N    write and attend in 30 layers, each row with N tokens before it
    prompt N       the same for one chunk of N tokens of an empty sequence
    greedy, top-p  sampling, every row alike

The cases take turns, so that what else the machine does falls on all of them.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from octavo.backends import plain
from octavo.bench.common import Row, Spread, report
from octavo.models.ops import Linear
from octavo.pallas_kernels.attention import blockwise
from octavo.pallas_kernels.attention.cases import Case, inputs
from octavo.pallas_kernels.sampling import Controls, sample

E, F, H, K, D, V, L = 576, 1536, 9, 3, 64, 49152, 30
PAGE_SIZE = 16

SHAPES = ((E, (H + 2 * K) * D), (H * D, E), (E, 2 * F), (F, E))

# A case is run(*args), whose last argument is donated and comes back as the second result.
Timed = tuple[Callable[..., tuple[Any, Any]], tuple[Any, ...]]


@cache
def weights(transposed: bool) -> list[list[Linear]]:
    """30 layers; half a gigabyte."""
    rng = np.random.default_rng(0)

    def weight(shape: tuple[int, int]) -> Linear:
        w = rng.normal(size=shape[::-1] if transposed else shape) * 0.02
        return Linear(jnp.asarray(w, jnp.float32))

    return [[weight(shape) for shape in SHAPES] for _ in range(L)]


def projections(rows: int, transposed: bool) -> Timed:
    """30 layers of matmuls, each fed by the one before."""

    def apply(x: jax.Array, layer: Linear) -> jax.Array:
        if transposed:
            return jax.lax.dot_general(x, layer.weight, (((1,), (1,)), ((), ())))
        return plain.linear(x, layer)

    def run(layers: list[list[Linear]], x: jax.Array) -> tuple[Any, Any]:
        for qkv, out, gate_up, down in layers:
            x = x + apply(apply(x, qkv)[:, : H * D], out)
            both = apply(x, gate_up)
            x = x + apply(jax.nn.silu(both[:, :F]) * both[:, F:], down)
        return (), x

    return run, (weights(transposed), jnp.ones((rows, E)))


def head(rows: int) -> Timed:
    """Logits, and one pass over them."""

    def run(embed: jax.Array, x: jax.Array) -> tuple[Any, Any]:
        return jnp.einsum("re,ve->rv", x, embed).max(-1), x

    return run, (jnp.ones((V, E)), jnp.ones((rows, E)))


def attention(case: Case) -> Timed:
    """30 layers, each with a cache of its own."""
    q, k, v, one, batch = inputs(case)

    def run(q: Any, k: Any, v: Any, batch: Any, caches: Any) -> tuple[Any, Any]:
        attend = partial(blockwise.attend, window=0, scale=D**-0.5, softcap=0.0)
        after = []
        for kept in caches:
            q, kept = attend(q, k, v, kept, batch)
            after.append(kept)
        return q, after

    return run, (q, k, v, batch, [jax.tree.map(jnp.copy, one) for _ in range(L)])


def decode(rows: int, context: int) -> Timed:
    """Rows that have `context` tokens before them."""
    pages = context // PAGE_SIZE + 1
    return attention(Case(((context, 1),) * rows, heads=(H, K, D), pages_per_slot=pages))


def prompt(tokens: int) -> Timed:
    """One chunk of a sequence that begins."""
    return attention(
        Case(((0, 0),), ((0, 0, tokens),), heads=(H, K, D), pages_per_slot=tokens // PAGE_SIZE)
    )


def sampling(rows: int, **settings: float) -> Timed:
    """Tokens of random logits."""
    rng = np.random.default_rng(0)
    packed = np.tile(Controls.pack(**settings), (rows, 1))  # type: ignore[arg-type]

    def run(logits: jax.Array, packed: jax.Array, seed: jax.Array) -> tuple[Any, Any]:
        return sample(logits, Controls.unpack(packed), seed, jnp.arange(rows))[0], seed

    logits = jnp.asarray(rng.normal(size=(rows, V)) * 3, jnp.float32)
    return run, (logits, jnp.asarray(packed), jnp.ones((rows, 2), jnp.uint32))


def cases(rows: Sequence[int], tokens: int) -> dict[str, Timed]:
    """All that is measured, by name."""
    found: dict[str, Timed] = {}
    for n in (*rows, tokens):
        found[f"projections, {n} rows"] = projections(n, False)
        found[f"projections [out, in], {n} rows"] = projections(n, True)
    for n in rows:
        found[f"head, {n} rows"] = head(n)
        for context in (128, 512):
            found[f"attention {context}, {n} rows"] = decode(n, context)
        found[f"greedy, {n} rows"] = sampling(n, temperature=0.0)
        found[f"top-p, {n} rows"] = sampling(n, temperature=0.8, top_p=0.95, top_k=50)
    found[f"prompt {tokens}"] = prompt(tokens)
    return found


def compiled(case: Timed) -> Callable[[], float]:
    """A function that runs the case once and gives its milliseconds."""
    run, args = case
    program = jax.jit(run, donate_argnums=len(args) - 1)
    donated = args[-1]

    def once() -> float:
        nonlocal donated
        begin = time.perf_counter()
        _, donated = jax.block_until_ready(program(*args[:-1], donated))
        return (time.perf_counter() - begin) * 1e3

    once()
    return once


def main(arguments: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32], metavar="N")
    parser.add_argument("--prompt", type=int, default=512, metavar="N")
    parser.add_argument("--rounds", type=int, default=10, metavar="N")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    args = parser.parse_args(arguments)
    runs = {name: compiled(case) for name, case in cases(args.rows, args.prompt).items()}
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(args.rounds):
        for name, once in runs.items():
            taken[name].append(once())
    rows = [Row(name, "ms", Spread.of(samples), digits=2) for name, samples in taken.items()]
    return report("cpu_parts", {"rounds": args.rounds}, rows, args)


if __name__ == "__main__":
    raise SystemExit(main())
