"""Experts' matrix products on the device that is here: our kernel, the plain loop, XLA's own.

    python -m octavo.bench.grouped [--shapes qwen-up,mixtral-down] [--rows 8,512,16384]

Rows are pairs of token and expert: 8 of Qwen3-30B-A3B are one token. Which expert a pair has is
drawn evenly. GB/s are of the weights that have rows, each counted once. A time is the least of
several rounds, in turns, each of some calls in a row. `apart` is the largest difference from the
plain loop, as a part of its largest number. On a CPU there is no kernel.
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from octavo.backends import gpu, plain
from octavo.bench.tpu_grouped import SHAPES
from octavo.bench.ways import compare
from octavo.cli.table import print_table
from octavo.pallas_kernels.grouped import gpu as triton
from octavo.pallas_kernels.grouped import tpu as mosaic

ROWS = (8, 64, 512, 4096, 16384, 65536)
PLAIN = "plain loop"
Way = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
Given = tuple[jax.Array, jax.Array, jax.Array]  # x [N, in], weight [X, in, out], sizes i32[X]


def ways(device: jax.Device) -> dict[str, Way]:
    """What makes [N, out] of the three, by name."""
    found: dict[str, Way] = {PLAIN: plain.grouped_linear, "ragged_dot": jax.lax.ragged_dot}
    if device.platform == "tpu":
        found["kernel"] = mosaic.grouped_linear
    elif device.platform == "gpu" and gpu.capability_of(device) >= triton.OLDEST:
        found["kernel"] = triton.grouped_linear
    return found


def weights(shape: tuple[int, int, int]) -> jax.Array:
    """bf16[X, in, out]."""
    return jax.jit(lambda: jax.random.normal(jax.random.key(1), shape, jnp.bfloat16))()


def measure(weight: jax.Array, N: int, rounds: int) -> list[tuple[str, ...]]:
    """A row of the table for each way."""
    X, depth, out = weight.shape
    sizes = np.bincount(np.random.default_rng(0).integers(0, X, N), minlength=X)
    x = jax.random.normal(jax.random.key(0), (N, depth), jnp.bfloat16)
    given = (x, weight, jnp.asarray(sizes, jnp.int32))
    every = {name: partial(built, way, given) for name, way in ways(jax.devices()[0]).items()}
    found = compare(every, dict.fromkeys(every, given), rounds)
    for name, it in found.items():
        if it.failure:
            print(f"{N} rows, {name} fails: {it.failure[:80]}")
    met = int(np.count_nonzero(sizes)) * depth * out * weight.dtype.itemsize
    return [
        (
            f"{N}",
            name,
            f"{1e6 * it.seconds:.0f}",
            f"{met / it.seconds / 1e9:.0f}",
            f"{2 * N * depth * out / it.seconds / 1e12:.1f}",
            f"{it.apart:.4f}",
        )
        for name, it in found.items()
        if not it.failure
    ]


def built(way: Way, given: Given) -> Any:
    """The compiled program."""
    return jax.jit(way).lower(*given).compile()


def main() -> None:
    """Print a table for each shape."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shapes", default=",".join(SHAPES), help="default: all")
    parser.add_argument("--rows", default=",".join(map(str, ROWS)))
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if unknown := set(options.shapes.split(",")) - set(SHAPES):
        parser.error(f"no shape {', '.join(sorted(unknown))}; there are {', '.join(SHAPES)}")
    print(jax.devices()[0].device_kind)
    for name in options.shapes.split(","):
        weight = weights(SHAPES[name])
        rows: list[tuple[str, ...]] = []
        for N in map(int, options.rows.split(",")):
            rows += measure(weight, N, options.rounds)
        print_table((name, "way", "us", "GB/s", "TFLOP/s", "apart"), rows, indent="")


if __name__ == "__main__":
    main()
