"""What our attention kernels cost on a TPU that is not here, read from their schedules.

    python -m octavo.engine.ahead.attention v6e --kind=bfloat16 --page=32 --dump=FOLDER

One step of a few rows and some chunk tokens is compiled, and what libtpu writes about its kernels
is read. A process does that for one chip and folder, since libtpu is told of the folder when jax
is imported; `costs` starts one.

    decode    bundles of the walk per TOKENS tokens of a row in one layer, on the path of a step
              that neither begins nor ends a row
    copies    cycles that the copies of these tokens from HBM take at the chip's bandwidth
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

from octavo.engine.ahead.schedule import CHIPS, Schedule, compile_for, environment

KINDS = {"bfloat16": (16, 128), "float8_e4m3fn": (32, 128), "int8": (32,)}
TOKENS = 2048
LONGEST = 16384  # tokens that a row may have
HEADS = (32, 8, 128)  # H, K, D
ROWS = 16
Numbers = dict[str, int]


def arguments(
    page: int,
    kind: str,
    heads: tuple[int, int, int] = HEADS,
    chunk_tokens: int = 512,
    longest: int = LONGEST,
) -> tuple[Any, ...]:
    """Abstract q, k, v, cache and batch of one step of ROWS rows and some chunk tokens."""
    import jax
    import jax.numpy as jnp

    from octavo.pallas_kernels.attention import tpu
    from octavo.pallas_kernels.attention.batch import RaggedBatch

    def array(*shape: int, dtype: Any = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    H, K, D = heads
    C, M, N = 8, -(-longest // page), ROWS + chunk_tokens
    shapes: dict[str, tuple[int, ...]] = dict(table=(ROWS, M), row_start=(ROWS,), row_count=(ROWS,))
    shapes |= {f"chunk_{name}": (C,) for name in ("slot", "start", "count", "offset")}
    shapes |= dict(dest=(N,), position=(N,), slot=(N,))
    ints: dict[str, Any] = {name: array(*shape) for name, shape in shapes.items()}
    batch = RaggedBatch(real=array(N, dtype=bool), page_size=page, **ints)
    cache = jax.eval_shape(lambda: tpu.init_kv(2000, page, K, D, kind))
    qkv = [array(N, h, D, dtype=jnp.bfloat16) for h in (H, K, K)]
    return (*qkv, cache, batch)


def walk(
    schedule: Schedule, heads: tuple[int, int, int], page: int, kind: str, longest: int
) -> int:
    """Bundles of the decode kernel per TOKENS tokens; `schedule` is its own."""
    from octavo.pallas_kernels.attention.tpu_decode import SLOTS, chunk_tokens
    from octavo.pallas_kernels.attention.tpu_layout import Layout

    H, K, D = heads
    walked = SLOTS * chunk_tokens(Layout(K, H // K, D), page, kind, longest)
    return round(schedule.hot_path(schedule.loops()[-1]) * TOKENS / walked)


def measure(
    chip: str,
    kind: str,
    page: int,
    dump: Path,
    heads: tuple[int, int, int] = HEADS,
    longest: int = LONGEST,
) -> Numbers:
    """Compile one mixed step and read its kernels' schedules; in libtpu's environment."""
    import jax.numpy as jnp

    from octavo.pallas_kernels.attention import tpu
    from octavo.pallas_kernels.attention.tpu_layout import Layout

    H, K, D = heads
    layout = Layout(K, H // K, D)

    def step(*given: Any) -> Any:
        return tpu.attend(*given, window=0, scale=D**-0.5, softcap=0.0, **tpu.chip(chip))

    compile_for(chip, step, arguments(page, kind, heads, longest=longest), donate=3)
    decode, prefill, write = (
        Schedule(dump, f"tpu_{name}") for name in ("decode", "prefill", "write")
    )
    size = TOKENS * layout.tiles * layout.width * jnp.dtype(kind).itemsize
    return {
        "decode": walk(decode, heads, page, kind, longest),
        "copies": round(CHIPS[chip].copy_cycles(size)),
        "decode all": decode.bundles,
        "decode spills": decode.spills,
        "prefill": prefill.hot_path(prefill.loops()[0]),
        "prefill all": prefill.bundles,
        "prefill spills": prefill.spills,
        "write all": write.bundles,
    }


def costs(
    chip: str,
    *,
    heads: tuple[int, int, int] = HEADS,
    kinds: tuple[str, ...] = (),
    pages: tuple[int, ...] = (),
    longest: int = LONGEST,
) -> Iterator[tuple[str, Numbers]]:
    """Names and `measure` of each kind and page; the usual ones where none are given.

    Raises CalledProcessError where a step does not compile; why was written to stderr.
    """
    module = "octavo.engine.ahead.attention"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", module, chip, "--dump", folder]
        command += ["--heads", *map(str, heads), f"--longest={longest}"]
        command += [f"--kind={kind}" for kind in kinds] + [f"--page={page}" for page in pages]
        done = subprocess.run(
            command, env=environment(Path(folder)), stdout=subprocess.PIPE, text=True, check=True
        )
    for line in done.stdout.splitlines():
        if line.startswith("{"):
            row = json.loads(line)
            yield row["name"], row["numbers"]


def main() -> None:
    """Print a JSON object for each kind and page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("chip", choices=list(CHIPS))
    parser.add_argument("--kind", action="append", choices=list(KINDS))
    parser.add_argument("--page", action="append", type=int)
    parser.add_argument("--heads", nargs=3, type=int, default=HEADS, metavar=("H", "K", "D"))
    parser.add_argument("--longest", type=int, default=LONGEST)
    parser.add_argument("--dump", type=Path, required=True, help="as in LIBTPU_INIT_ARGS")
    options = parser.parse_args()
    from octavo.pallas_kernels.attention.tpu import smallest_page

    for kind in options.kind or KINDS:
        pages = options.page or KINDS[kind]
        for page in (page for page in pages if page >= smallest_page(kind)):
            heads, longest = tuple(options.heads), options.longest
            numbers = measure(options.chip, kind, page, options.dump, heads, longest)
            name = f"{options.chip} {kind} page {page}"
            print(json.dumps({"name": name, "numbers": numbers}), flush=True)


if __name__ == "__main__":
    main()
