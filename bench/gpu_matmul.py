"""The matrix products of one layer with what lies between them, built in several ways.

    python -m octavo.bench.gpu_matmul [--tokens 256,2304,8448] [--layers 4]

What a prompt step of the Llama-3.1-8B shape spends most of its time in: queries, keys and values;
out; gate and up, SiLU; down; both additions and norms. No attention. Each way is one set of XLA's
options, one layout of the weights, and gate and up by XLA or by our kernel; all are compiled first,
in parallel, then timed in turns. The last column: how far the results lie from the first way's.
"""

import argparse
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from octavo.bench.ways import Found, compare
from octavo.cli.table import print_table
from octavo.pallas_kernels.gated import gpu as gated

E, QKV, F = 4096, 6144, 14336
PRODUCTS = ((E, QKV), (E, E), (E, 2 * F), (F, E))
# Its Lt part, which XLA takes by default.
CUBLAS = {"xla_gpu_enable_triton_gemm": False}


@dataclass(frozen=True)
class Way:
    """How the products are made."""

    options: dict[str, Any]
    turned: bool = False  # weights lie [out, in]
    kernel: gated.Tuning | None = None  # for gate and up


WAYS = {
    "XLA's own and cuBLAS": Way({}),
    "cuBLAS": Way(CUBLAS),
    "gated kernel, cuBLAS": Way(CUBLAS, kernel=gated.Tuning()),
    "gated kernel, bands of 8": Way(CUBLAS, kernel=gated.Tuning(band=8)),
    "gated kernel, XLA's own": Way({}, kernel=gated.Tuning()),
    "cuBLAS, [out, in]": Way(CUBLAS, turned=True),
    "cuBLAS, level 5": Way(CUBLAS | {"xla_gpu_autotune_level": 5}),
}


def norm(x: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + 1e-6)
    return (wide * scale).astype(x.dtype)


def layer(x: jax.Array, weights: tuple[jax.Array, ...], way: Way) -> jax.Array:
    """x [T, E] -> the same."""

    def product(x: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.einsum("ti,oi->to" if way.turned else "ti,io->to", x, w)

    mixed = product(norm(x), weights[0])
    x = x + product(mixed[:, :E], weights[1])
    if way.kernel is not None:
        inner = gated.gated_linear(norm(x), weights[2], "silu", tuning=way.kernel)
        return x + product(inner, weights[3])
    both = product(norm(x), weights[2])
    return x + product(jax.nn.silu(both[:, :F]) * both[:, F:], weights[3])


def weights(layers: int, turned: bool) -> list[tuple[jax.Array, ...]]:
    """Random ones: products of zeros are faster. The same numbers, turned or not."""
    keys = iter(jax.random.split(jax.random.key(0, impl="rbg"), layers * len(PRODUCTS)))

    def one(shape: tuple[int, int]) -> jax.Array:
        w = jax.random.normal(next(keys), shape, jnp.bfloat16) * 0.01
        return w.T if turned else w

    return [tuple(one(shape) for shape in PRODUCTS) for _ in range(layers)]


def build(tokens: int, layers: int, way: Way) -> Any:
    """The compiled program: x [T, E] and weights -> x after all layers."""

    def run(x: jax.Array, every: Any) -> jax.Array:
        for w in every:
            x = layer(x, w, way)
        return x

    shapes = jax.eval_shape(lambda: weights(layers, way.turned))
    x = jax.ShapeDtypeStruct((tokens, E), jnp.bfloat16)
    return jax.jit(run).lower(x, shapes).compile(compiler_options=way.options or None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", default="256,2304,8448")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    sizes = [int(n) for n in options.tokens.split(",")]
    with ThreadPoolExecutor(os.cpu_count() or 1) as threads:
        work = {
            (n, name): threads.submit(build, n, options.layers, way)
            for n in sizes
            for name, way in WAYS.items()
        }
    inputs = {turned: weights(options.layers, turned) for turned in (False, True)}
    rows: list[tuple[str, ...]] = []
    for n in sizes:
        x = jax.random.normal(jax.random.key(1), (n, E), jnp.bfloat16)
        given = {name: (x, inputs[way.turned]) for name, way in WAYS.items()}
        ways = {name: work[n, name].result for name in WAYS}
        found = compare(ways, given, options.rounds, Exception)
        rows += [line(n, name, options.layers, it) for name, it in found.items()]
    print_table(("tokens", "way", "ms a layer", "TFLOP/s", "apart"), rows, indent="")


def line(n: int, name: str, layers: int, it: Found) -> tuple[str, ...]:
    """Of the table."""
    if it.failure:
        return str(n), name, "refused", it.failure[:60], ""
    flops = 2 * sum(i * o for i, o in PRODUCTS) * layers * n
    each = f"{1e3 * it.seconds / layers:.3f}"
    return str(n), name, each, f"{flops / it.seconds / 1e12:.0f}", f"{it.apart:.4f}"


if __name__ == "__main__":
    main()
