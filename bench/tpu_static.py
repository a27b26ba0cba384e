"""What our TPU kernels cost, read from their schedules, on a machine without a TPU.

    python -m octavo.bench.tpu_static                    the table, for every chip
    python -m octavo.bench.tpu_static v6e --page 16      one chip, one page size
    python -m octavo.bench.tpu_static --check FILE       fail where a number grew by more than 3 %
    python -m octavo.bench.tpu_static --write FILE       keep the numbers of this libtpu

The heads are Llama-3.1-8B's unless --heads says otherwise: 32 query, 8 KV heads of 128.

    decode    bundles of the walk per 2,048 tokens, on the path of a step that neither begins nor
              ends a row, and their share of the cycles that the copies of these tokens take
    prefill   bundles of a KV head's block of queries over one buffer of tokens
    spills    stores of registers that did not suffice, in decode and in prefill
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from octavo.bench.tpu_compile import (
    CHIPS,
    NO_LIBTPU,
    Schedule,
    compile_for,
    environment,
    libtpu_version,
)

KINDS = {"bfloat16": (16, 128), "float8_e4m3fn": (32, 128), "int8": (32,)}
TOKENS = 2048
LONGEST = 16384  # tokens that a row may have
GROWTH = 1.03
HEADS = (32, 8, 128)  # H, K, D
Numbers = dict[str, int]


def arguments(
    page: int, kind: str, heads: tuple[int, int, int] = HEADS, chunk_tokens: int = 512
) -> tuple[Any, ...]:
    """Abstract q, k, v, cache and batch of one step of 16 rows and some chunk tokens."""
    import jax
    import jax.numpy as jnp

    from octavo.pallas_kernels.attention import tpu
    from octavo.pallas_kernels.attention.batch import RaggedBatch

    def array(*shape: int, dtype: Any = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    H, K, D = heads
    rows, C, M = 16, 8, LONGEST // page
    N = rows + chunk_tokens
    shapes: dict[str, tuple[int, ...]] = dict(table=(rows, M), row_start=(rows,), row_count=(rows,))
    shapes |= {f"chunk_{name}": (C,) for name in ("slot", "start", "count", "offset")}
    shapes |= dict(dest=(N,), position=(N,), slot=(N,))
    ints: dict[str, Any] = {name: array(*shape) for name, shape in shapes.items()}
    batch = RaggedBatch(real=array(N, dtype=bool), page_size=page, **ints)
    cache = jax.eval_shape(lambda: tpu.init_kv(2000, page, K, D, kind))
    qkv = [array(N, h, D, dtype=jnp.bfloat16) for h in (H, K, K)]
    return (*qkv, cache, batch)


def measure(
    chip: str, kind: str, page: int, dump: Path, heads: tuple[int, int, int] = HEADS
) -> Numbers:
    """Compile one mixed step and read its kernels' schedules; in libtpu's environment."""
    import jax.numpy as jnp

    from octavo.pallas_kernels.attention import tpu
    from octavo.pallas_kernels.attention.tpu_decode import SLOTS, chunk_tokens
    from octavo.pallas_kernels.attention.tpu_layout import Layout

    H, K, D = heads
    layout = Layout(K, H // K, D)

    def step(*given: Any) -> Any:
        return tpu.attend(*given, window=0, scale=D**-0.5, softcap=0.0, **tpu.chip(chip))

    compile_for(chip, step, arguments(page, kind, heads), donate=3)
    decode, prefill, write = (
        Schedule(dump, f"tpu_{name}") for name in ("decode", "prefill", "write")
    )
    walked = SLOTS * chunk_tokens(layout, page, kind, LONGEST)
    size = TOKENS * layout.tiles * layout.width * jnp.dtype(kind).itemsize
    return {
        "decode": round(decode.hot_path(decode.loops()[-1]) * TOKENS / walked),
        "copies": round(CHIPS[chip].copy_cycles(size)),
        "decode all": decode.bundles,
        "decode spills": decode.spills,
        "prefill": prefill.hot_path(prefill.loops()[0]),
        "prefill all": prefill.bundles,
        "prefill spills": prefill.spills,
        "write all": write.bundles,
    }


def child(chip: str, *choices: str) -> Iterator[tuple[str, Numbers]]:
    """`measure` of one chip in a process of its own; choices as on the command line."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "octavo.bench.tpu_static", chip, "--dump", folder]
        command += choices
        done = subprocess.run(
            command, env=environment(Path(folder)), stdout=subprocess.PIPE, text=True, check=True
        )
    for line in done.stdout.splitlines():
        if line.startswith("{"):
            row = json.loads(line)
            yield row["name"], row["numbers"]


def grown(now: dict[str, Numbers], kept: dict[str, Numbers]) -> list[str]:
    """A sentence for each number that is more than 3 % above the one kept."""
    found = []
    for name, numbers in now.items():
        for what, value in numbers.items():
            before = kept.get(name, {}).get(what)
            if before is None:
                found.append(f"{name}: {what} was not kept; run with --write")
            elif value > before * GROWTH:
                found.append(f"{name}: {what} grew from {before:,} to {value:,}")
    return found


def line(name: str, n: Numbers) -> str:
    """One row of the table."""
    return (
        f"{name:<26}{n['decode']:>8,}{n['copies']:>8,}{n['decode'] / n['copies']:>7.2f}"
        f"{n['prefill']:>9,}{n['decode spills']:>8,}{n['prefill spills']:>8,}"
    )


def main() -> None:
    """Print the table; exit 1 where --check finds growth."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("chips", nargs="*", metavar="CHIP", help=f"of {', '.join(CHIPS)}")
    parser.add_argument("--kind", action="append", choices=list(KINDS))
    parser.add_argument("--page", action="append", type=int)
    parser.add_argument("--heads", nargs=3, type=int, default=HEADS, metavar=("H", "K", "D"))
    parser.add_argument("--check", type=Path)
    parser.add_argument("--write", type=Path)
    parser.add_argument("--dump", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    chips = options.chips or list(CHIPS)
    if unknown := set(chips) - set(CHIPS):
        parser.error(f"no chip {', '.join(sorted(unknown))}; there are {', '.join(CHIPS)}")
    if libtpu_version() is None:
        parser.error(NO_LIBTPU)
    heads = tuple(options.heads)
    choices = ["--heads", *map(str, heads)]
    choices += [f"--kind={kind}" for kind in options.kind or []]
    choices += [f"--page={page}" for page in options.page or []]
    if options.dump:
        for kind in options.kind or KINDS:
            for page in KINDS[kind]:
                if not options.page or page in options.page:
                    numbers = measure(chips[0], kind, page, options.dump, heads)
                    name = f"{chips[0]} {kind} page {page}"
                    print(json.dumps({"name": name, "numbers": numbers}), flush=True)
        return
    print(f"libtpu {libtpu_version()}, bundles per {TOKENS:,} tokens")
    print(f"{'':<26}{'decode':>8}{'copies':>8}{'share':>7}{'prefill':>9}{'spills':>16}")
    rows = {}
    for chip in chips:
        for name, numbers in child(chip, *choices):
            rows[name] = numbers
            print(line(name, numbers), flush=True)
    if options.write:
        kept = {"libtpu": libtpu_version(), "rows": rows}
        options.write.write_text(json.dumps(kept, indent=1) + "\n")
    if options.check:
        found = grown(rows, json.loads(options.check.read_text())["rows"])
        print("\n".join(found))
        sys.exit(bool(found))


if __name__ == "__main__":
    main()
