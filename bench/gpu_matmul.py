"""The matrix products of one layer with what lies between them, built in several ways.

    python -m octavo.bench.gpu_matmul [--tokens 2304,4352,8448] [--layers 4]

What a prompt step of the Llama-3.1-8B shape spends most of its time in: queries, keys and values;
out; gate and up, SiLU; down; both additions and norms. No attention. Each way is one set of XLA's
options and one layout of the weights; all are compiled first, in parallel, then timed in turns.
"""

import argparse
import os
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp

from octavo.cli.table import print_table

E, QKV, F = 4096, 6144, 14336
PRODUCTS = ((E, QKV), (E, E), (E, 2 * F), (F, E))
# Its Lt part, which XLA takes by default.
CUBLAS = {"xla_gpu_enable_triton_gemm": False}
# By name: whether weights lie [out, in], and XLA's options.
WAYS: dict[str, tuple[bool, dict[str, Any]]] = {
    "XLA's own and cuBLAS": (False, {}),
    "cuBLAS": (False, CUBLAS),
    "cuBLAS, [out, in]": (True, CUBLAS),
    "cuBLAS, not its Lt": (False, CUBLAS | {"xla_gpu_enable_cublaslt": False}),
    "cuBLAS, level 5": (False, CUBLAS | {"xla_gpu_autotune_level": 5}),
    "cuDNN fusions": (False, CUBLAS | {"xla_gpu_cudnn_gemm_fusion_level": 2}),
    "cuDNN fusions, [out, in]": (True, CUBLAS | {"xla_gpu_cudnn_gemm_fusion_level": 2}),
}


def norm(x: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + 1e-6)
    return (wide * scale).astype(x.dtype)


def layer(x: jax.Array, weights: tuple[jax.Array, ...], turned: bool) -> jax.Array:
    """x [T, E] -> the same; `turned`: weights lie [out, in]."""

    def product(x: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.einsum("ti,oi->to" if turned else "ti,io->to", x, w)

    mixed = product(norm(x), weights[0])
    x = x + product(mixed[:, :E], weights[1])
    both = product(norm(x), weights[2])
    return x + product(jax.nn.silu(both[:, :F]) * both[:, F:], weights[3])


def weights(layers: int, turned: bool) -> list[tuple[jax.Array, ...]]:
    """Random ones: products of zeros are faster."""
    keys = iter(jax.random.split(jax.random.key(0, impl="rbg"), layers * len(PRODUCTS)))
    shapes = [(o, i) if turned else (i, o) for i, o in PRODUCTS]

    def one(shape: tuple[int, int]) -> jax.Array:
        return jax.random.normal(next(keys), shape, jnp.bfloat16) * 0.01

    return [tuple(one(shape) for shape in shapes) for _ in range(layers)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", default="2304,4352,8448")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    sizes = [int(n) for n in options.tokens.split(",")]

    def build(tokens: int, turned: bool, how: dict[str, Any]) -> Any:
        def run(x: jax.Array, every: Any) -> jax.Array:
            for w in every:
                x = layer(x, w, turned)
            return x

        shapes = jax.eval_shape(lambda: weights(options.layers, turned))
        x = jax.ShapeDtypeStruct((tokens, E), jnp.bfloat16)
        return jax.jit(run).lower(x, shapes).compile(compiler_options=how or None)

    with ThreadPoolExecutor(os.cpu_count() or 1) as threads:
        work = {
            (n, name): threads.submit(build, n, *way) for n in sizes for name, way in WAYS.items()
        }
    inputs = {turned: weights(options.layers, turned) for turned in (False, True)}
    flops = 2 * sum(i * o for i, o in PRODUCTS) * options.layers
    rows: list[tuple[str, ...]] = []
    for n in sizes:
        x = jax.random.normal(jax.random.key(1), (n, E), jnp.bfloat16)
        programs = {name: work[n, name] for name in WAYS}
        best = {name: timed(programs, name, x, inputs[WAYS[name][0]], rows) for name in WAYS}
        for _ in range(options.rounds):  # in turns: the card's clock changes with its warmth
            for name, seconds in best.items():
                if seconds:
                    program = programs[name].result()
                    best[name] = min(seconds, once(program, x, inputs[WAYS[name][0]]))
        for name, seconds in best.items():
            if seconds:
                each = 1e3 * seconds / options.layers
                rows.append((str(n), name, f"{each:.3f}", f"{flops * n / seconds / 1e12:.0f}"))
    print_table(("tokens", "way", "ms a layer", "TFLOP/s"), rows, indent="")


def timed(programs: dict[str, Any], name: str, x: Any, every: Any, rows: list[Any]) -> float:
    """Seconds of the first call that counts; 0 where XLA refuses the way."""
    try:
        program = programs[name].result()
        jax.block_until_ready(program(x, every))
    except Exception as failure:
        rows.append((str(x.shape[0]), name, "refused", str(failure).splitlines()[0][:60]))
        return 0.0
    return once(program, x, every)


def once(program: Any, x: jax.Array, every: Any, calls: int = 8) -> float:
    """Seconds of one call, of several in a row."""
    began = time.perf_counter()
    for _ in range(calls):
        x = program(x, every)
    jax.block_until_ready(x)
    return (time.perf_counter() - began) / calls


if __name__ == "__main__":
    main()
