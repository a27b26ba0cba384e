"""Projections of a few rows with their norm, activation and addition: one kernel beside XLA's.

    python -m octavo.bench.gpu_rows [--rows 1,8]

Per projection of both shapes: XLA's time for the parts and, of the tiles tried, the fastest few of
`project_rows`. Timed in one loop on the device over weights that no cache holds.
"""

import argparse
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from octavo.bench.gpu_matmul import norm, once
from octavo.cli.table import print_table
from octavo.pallas_kernels.linear.gpu_rows import RowsTuning, project, why_not

TUNINGS = tuple(
    RowsTuning(columns, depth, warps, stages)
    for columns, depth, warps, stages in product((16, 32, 64), (64, 128, 256), (4, 8), (3, 4))
    if 2048 <= columns * depth <= 8192
)
BYTES = 1 << 28  # of weights a call reads: more than the second cache holds


@dataclass(frozen=True)
class Projection:
    """x [N, E] -> [N, F]; with `gate` from [E, 2, F]."""

    name: str
    E: int
    F: int
    norm: bool = False
    gate: str = ""
    add: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.E, 2, self.F) if self.gate else (self.E, self.F)

    @property
    def size(self) -> int:
        return 2 * self.E * self.F * (2 if self.gate else 1)


CASES = (
    Projection("8B qkv", 4096, 6144, norm=True),
    Projection("8B out", 4096, 4096, add=True),
    Projection("8B gate up", 4096, 14336, norm=True, gate="silu"),
    Projection("8B down", 14336, 4096, add=True),
    Projection("0.6B qkv", 1024, 4096, norm=True),
    Projection("0.6B out", 2048, 1024, add=True),
    Projection("0.6B gate up", 1024, 3072, norm=True, gate="silu"),
    Projection("0.6B down", 3072, 1024, add=True),
)


def apart(case: Projection, x: jax.Array, w: jax.Array, add: jax.Array) -> jax.Array:
    """As XLA does it."""
    y = jnp.einsum("ni,i...->n...", norm(x) if case.norm else x, w)
    if case.gate:
        y = jax.nn.silu(y[:, 0]) * y[:, 1]
    return y + add if case.add else y


def joined(case: Projection, tuning: RowsTuning, x: Any, w: Any, add: Any) -> jax.Array:
    weight = jnp.ones(case.E, x.dtype) if case.norm else None
    return project(
        x, w, norm=weight, eps=1e-6, gate=case.gate, add=add if case.add else None, tuning=tuning
    )


def build(case: Projection, rows: int, how: RowsTuning | None) -> Any:
    """All copies of the weights one after the other, each call fed by the one before."""

    def run(x: jax.Array, every: list[jax.Array]) -> jax.Array:
        add = jnp.zeros((rows, case.F), x.dtype)
        for w in every:
            y = apart(case, x, w, add) if how is None else joined(case, how, x, w, add)
            add = y
            x = lax.optimization_barrier((x, y))[0]
        return add

    copies = copies_of(case)
    every = [jax.ShapeDtypeStruct(case.shape, jnp.bfloat16)] * copies
    return jax.jit(run).lower(jax.ShapeDtypeStruct((rows, case.E), jnp.bfloat16), every).compile()


def copies_of(case: Projection) -> int:
    return max(2, min(24, BYTES // case.size))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", default="8")
    options = parser.parse_args()
    table = []
    for rows, case in product((int(n) for n in options.rows.split(",")), CASES):
        key = jax.random.key(0, impl="rbg")
        x = jax.random.normal(key, (rows, case.E), jnp.bfloat16)
        every = [
            jax.random.normal(jax.random.fold_in(key, i), case.shape, jnp.bfloat16) * 0.01
            for i in range(copies_of(case))
        ]
        ways = [None, *(t for t in TUNINGS if case.E % t.depth == 0 and case.F % t.columns == 0)]
        assert why_not(x, every[0], None, case.gate) is None
        with ThreadPoolExecutor(os.cpu_count() or 1) as threads:
            work = {how: threads.submit(build, case, rows, how) for how in ways}
        found = []
        for how, program in work.items():
            try:
                run = program.result()
                jax.block_until_ready(run(x, every))
                found.append((min(fed(run, x, every) for _ in range(3)), how))
            except Exception as failure:
                print(f"{case.name}, {how}: {str(failure).splitlines()[0][:80]}", flush=True)
        best = sorted((pair for pair in found if pair[1] is not None), key=lambda pair: pair[0])
        for seconds, how in [*(pair for pair in found if pair[1] is None), *best[:2]]:
            each = seconds / len(every)
            name = "XLA, apart" if how is None else str(how).removeprefix("RowsTuning")
            rate = f"{case.size / each / 1e9:,.0f}"
            table.append((str(rows), case.name, name, f"{1e6 * each:.1f}", rate))
    print_table(("rows", "projection", "way", "us", "GB/s"), table, indent="")


def fed(run: Any, x: jax.Array, every: list[jax.Array]) -> float:
    """Seconds of one call; its result has another shape than x, so that x stays."""
    return once(lambda _, weights: run(x, weights), x, every)


if __name__ == "__main__":
    main()
