"""The matrix products of one layer with what lies between them, built in several ways.

    python -m octavo.bench.gpu_matmul [--shape 8b] [--tokens 256,2304,8448] [--layers 4]
    python -m octavo.bench.gpu_matmul --tokens 64,128,256 --ways 'down'

What a prompt step spends most of its time in: queries, keys and values; out; gate and up, SiLU;
down; both additions and norms. No attention. Each way is one set of XLA's options, one layout of
the weights, gate and up by XLA or by our kernel, and products whole or in parts of their depth that
are summed after; all are compiled first, in parallel, then timed in turns. The last column: how far
the results lie from the first way's.
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


@dataclass(frozen=True)
class Shape:
    """Of one layer."""

    E: int
    heads: int  # H D, what `out` takes
    QKV: int
    F: int

    @property
    def products(self) -> tuple[tuple[int, int], ...]:
        """Each weight's [in, out]."""
        return (
            (self.E, self.QKV),
            (self.heads, self.E),
            (self.E, 2 * self.F),
            (self.F, self.E),
        )


SHAPES = {"8b": Shape(4096, 4096, 6144, 14336), "0.6b": Shape(1024, 2048, 4096, 3072)}
# Its Lt part, which XLA takes by default.
CUBLAS = {"xla_gpu_enable_triton_gemm": False}


PARTS = ((1, 1, 2), (1, 1, 4), (1, 2, 1), (1, 4, 1), (2, 1, 1), (4, 1, 1), (1, 2, 4), (2, 2, 4))


@dataclass(frozen=True)
class Way:
    """How the products are made."""

    options: dict[str, Any]
    turned: bool = False  # weights lie [out, in]
    kernel: gated.Tuning | None = None  # for gate and up
    parts: tuple[int, int, int] = (1, 1, 1)  # of the depth of qkv, out and down


WAYS = {
    "XLA's own and cuBLAS": Way({}),
    "cuBLAS": Way(CUBLAS),
    "gated kernel, cuBLAS": Way(CUBLAS, kernel=gated.Tuning()),
    "gated kernel, bands of 8": Way(CUBLAS, kernel=gated.Tuning(band=8)),
    "gated kernel, XLA's own": Way({}, kernel=gated.Tuning()),
    "cuBLAS, [out, in]": Way(CUBLAS, turned=True),
    "cuBLAS, level 5": Way(CUBLAS | {"xla_gpu_autotune_level": 5}),
    "cuBLAS, parts of qkv, out, down: whole": Way(CUBLAS, kernel=gated.Tuning()),
    **{
        f"{name}, parts of qkv, out, down: {parts}": Way(
            options, kernel=gated.Tuning(), parts=parts
        )
        for name, options in (("cuBLAS", CUBLAS), ("XLA's own", {}))
        for parts in PARTS
    },
}


def norm(x: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + 1e-6)
    return (wide * scale).astype(x.dtype)


def product(x: jax.Array, w: jax.Array, way: Way, parts: int = 1) -> jax.Array:
    """x [T, in] by w -> [T, out]."""
    if way.turned:
        return jnp.einsum("ti,oi->to", x, w)
    if parts == 1:
        return jnp.einsum("ti,io->to", x, w)
    x, w = x.reshape(x.shape[0], parts, -1), w.reshape(parts, -1, w.shape[1])
    each = jnp.einsum("tpi,pio->pto", x, w, preferred_element_type=jnp.float32)
    return sum(each[1:], each[0]).astype(x.dtype)


def layer(shape: Shape, x: jax.Array, weights: tuple[jax.Array, ...], way: Way) -> jax.Array:
    """x [T, E] -> the same."""
    F, (qkv, out, down) = shape.F, way.parts
    mixed = product(norm(x), weights[0], way, qkv)
    x = x + product(mixed[:, : shape.heads], weights[1], way, out)
    if way.kernel is not None:
        inner = gated.gated_linear(norm(x), weights[2], "silu", tuning=way.kernel)
    else:
        both = product(norm(x), weights[2], way)
        inner = jax.nn.silu(both[:, :F]) * both[:, F:]
    return x + product(inner, weights[3], way, down)


def weights(shape: Shape, layers: int, turned: bool) -> list[tuple[jax.Array, ...]]:
    """Random ones: products of zeros are faster. The same numbers, turned or not."""
    keys = iter(jax.random.split(jax.random.key(0, impl="rbg"), layers * len(shape.products)))

    def one(size: tuple[int, int]) -> jax.Array:
        w = jax.random.normal(next(keys), size, jnp.bfloat16) * 0.01
        return w.T if turned else w

    return [tuple(one(size) for size in shape.products) for _ in range(layers)]


def build(shape: Shape, tokens: int, layers: int, way: Way) -> Any:
    """The compiled program: x [T, E] and weights -> x after all layers."""

    def run(x: jax.Array, every: Any) -> jax.Array:
        for w in every:
            x = layer(shape, x, w, way)
        return x

    shapes = jax.eval_shape(lambda: weights(shape, layers, way.turned))
    x = jax.ShapeDtypeStruct((tokens, shape.E), jnp.bfloat16)
    return jax.jit(run).lower(x, shapes).compile(compiler_options=way.options or None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="8b", help="Llama-3.1-8B or Qwen3-0.6B")
    parser.add_argument("--tokens", default="256,2304,8448")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ways", default="", help="only those whose names have this in them")
    options = parser.parse_args()
    shape = SHAPES[options.shape]
    ways = {name: way for name, way in WAYS.items() if options.ways in name}
    sizes = [int(n) for n in options.tokens.split(",")]
    with ThreadPoolExecutor(os.cpu_count() or 1) as threads:
        work = {
            (n, name): threads.submit(build, shape, n, options.layers, way)
            for n in sizes
            for name, way in ways.items()
        }
    kinds = {way.turned for way in ways.values()}
    inputs = {turned: weights(shape, options.layers, turned) for turned in kinds}
    rows: list[tuple[str, ...]] = []
    for n in sizes:
        x = jax.random.normal(jax.random.key(1), (n, shape.E), jnp.bfloat16)
        given = {name: (x, inputs[way.turned]) for name, way in ways.items()}
        built = {name: work[n, name].result for name in ways}
        found = compare(built, given, options.rounds, Exception)
        rows += [line(shape, n, name, options.layers, it) for name, it in found.items()]
    print_table(("tokens", "way", "ms a layer", "TFLOP/s", "apart"), rows, indent="")


def line(shape: Shape, n: int, name: str, layers: int, it: Found) -> tuple[str, ...]:
    """Of the table."""
    if it.failure:
        return str(n), name, "refused", it.failure[:60], ""
    flops = 2 * sum(i * o for i, o in shape.products) * layers * n
    each = f"{1e3 * it.seconds / layers:.3f}"
    return str(n), name, each, f"{flops / it.seconds / 1e12:.0f}", f"{it.apart:.4f}"


if __name__ == "__main__":
    main()
