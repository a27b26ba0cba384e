"""What the TPU kernel for experts costs, read from its schedules, on a machine without a TPU.

    python -m octavo.bench.tpu_grouped [v6e tpu7x] [--rows 8,512,65536]

Needs libtpu (the environment of `make aot`). Weights lie as a loop over layers keeps them: on tpu7x
in blocks of 128 columns. Rows are pairs of token and expert.

    tile      bundles of one tile of rows with one block of columns, the shortest way
    copy      cycles that this block of weights takes from HBM
    call      of a whole call with as many rows for each expert: the larger of both sums. Cycles.
    loop      the compiler's estimate of the plain loop of `backends.plain`, likewise
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from octavo.engine.ahead.schedule import (
    CHIPS,
    NO_LIBTPU,
    Schedule,
    compile_for,
    environment,
    libtpu_version,
)

SHAPES = {  # X experts, in, out
    "qwen-up": (128, 2048, 1536),
    "qwen-down": (128, 768, 2048),
    "mixtral-up": (8, 4096, 28672),
    "mixtral-down": (8, 14336, 4096),
}
ROWS = (8, 512, 65536)
LAYERS = 2  # in the stack
Numbers = dict[str, int]


def measure(chip: str, shape: tuple[int, int, int], N: int, dump: Path) -> Numbers:
    """Compile both for one shape and read what they cost; in libtpu's environment."""
    import jax
    import jax.numpy as jnp

    from octavo.backends import chips, plain
    from octavo.pallas_kernels.grouped import tpu

    def array(*shape: int, dtype: Any = jnp.bfloat16) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    X, depth, out = shape
    blocked = chips.CHIPS[chip].columns
    lies = (out // blocked, depth, blocked) if blocked else (depth, out)
    weight = array(LAYERS * X, *lies)
    numbers = (array(X, dtype=jnp.int32), array(dtype=jnp.int32))
    given = (array(N, depth), weight, *numbers)
    made = compile_for(chip, tpu.grouped_linear, given)
    schedule = Schedule(dump, "tpu_grouped")
    columns, tile = tpu.block_columns(weight, N), min(tpu.TILE, N)
    met = min(X, N)
    tiles = (-(-N // tile) + met - 1) * (out // columns)
    *inner, outer = schedule.loops()
    one = schedule.hot_path(outer)
    if inner:
        one += (tpu.loops(columns, depth) - 1) * schedule.hot_path(inner[0])
    copied = CHIPS[chip].copy_cycles(depth * columns * 2)
    slow = compile_for(chip, plain.grouped_linear, given).as_text()
    return {
        "tile": one,
        "copy": round(copied),
        "call": round(max(tiles * one, met * out // columns * copied)),
        "loop": loop_cycles(slow, -(-N // plain.ROWS_PER_TILE) if N > 32 * X else met),
        "spills": schedule.spills,
        "temporary": made.memory_analysis().temp_size_in_bytes,
    }


def loop_cycles(text: str, times: int) -> int:
    """The estimates of a program whose only loop runs so often."""
    body = re.search(r" while\(.*body=%?([\w.\-]+)", text)
    assert body is not None

    def total(start: str) -> int:
        begin = text.index(start)
        part = text[begin : text.index("\n}", begin)]
        return sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', part)))

    return total("\nENTRY ") + times * total(f"\n%{body[1]} ")


def child(chip: str, rows: str) -> Iterator[tuple[str, Numbers]]:
    """`measure` of one chip in a process of its own; rows as on the command line."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "octavo.bench.tpu_grouped", chip, "--dump", folder]
        done = subprocess.run(
            [*command, "--rows", rows],
            env=environment(Path(folder)),
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    for line in done.stdout.splitlines():
        row = json.loads(line)
        yield row["name"], row["numbers"]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("chips", nargs="*", metavar="CHIP", help=f"of {', '.join(CHIPS)}")
    parser.add_argument("--rows", default=",".join(map(str, ROWS)))
    parser.add_argument("--dump", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := set(options.chips) - set(CHIPS):
        parser.error(f"no chip {', '.join(sorted(unknown))}; there are {', '.join(CHIPS)}")
    if libtpu_version() is None:
        parser.error(NO_LIBTPU)
    if options.dump:
        for name, shape in SHAPES.items():
            for N in map(int, options.rows.split(",")):
                numbers = measure(options.chips[0], shape, N, options.dump)
                print(json.dumps({"name": f"{name} {N}", "numbers": numbers}), flush=True)
        return
    print(f"libtpu {libtpu_version()}, cycles")
    for chip in options.chips or CHIPS:
        for name, n in child(chip, options.rows):
            print(f"{chip:<6}{name:<20}" + "".join(f"{k} {v:>12,}  " for k, v in n.items()))


if __name__ == "__main__":
    main()
