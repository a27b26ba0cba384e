"""Ragged paged attention v3, which TPU servers use, beside our decode kernel: static costs.

    pip download tpu-inference --no-deps
    python -m octavo.bench.tpu_v3 --wheel tpu_inference-VERSION.whl [v6e tpu7x]

Both are compiled by the libtpu that is installed here, for the heads of Llama-3.1-8B (32 query, 8
KV heads of 128) and rows of up to 16,384 tokens. Of v3 only the kernel is imported. Its blocks are
2,048 tokens. Numbers are bundles per 2,048 tokens, shares are of the cycles of the copies.

    ours      the shortest way through the walk that leaves out no product: with the page copies'
              starts, which share its bundles
    v3        the same of v3's innermost loop, in which no page copy is started
    v3 whole  all that is listed of the loop around it, where they are, with what runs once a row
"""

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
import types
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

from octavo.engine.ahead import attention
from octavo.engine.ahead.schedule import (
    CHIPS,
    NO_LIBTPU,
    Schedule,
    compile_for,
    environment,
    libtpu_version,
)

PACKAGE = "tpu_inference"
KERNEL = f"{PACKAGE}.kernels.ragged_paged_attention.v3"
POOL = 2000  # pages
CASES = (("bfloat16", 16), ("bfloat16", 128), ("float8_e4m3fn", 32), ("float8_e4m3fn", 128))


def load(folder: Path, version: int) -> Any:
    """v3's kernel module, told that the chip is of this version. Nothing else of its package runs:
    the packages around it are stand-ins that only know where their files lie."""
    parts = KERNEL.split(".")
    for depth in range(1, len(parts) + 1):
        stand_in = types.ModuleType(".".join(parts[:depth]))
        stand_in.__path__ = [str(folder.joinpath(*parts[:depth]))]
        sys.modules[stand_in.__name__] = stand_in
    kernel: Any = importlib.import_module(f"{KERNEL}.kernel")
    kernel.get_tpu_version = lambda: version
    return kernel


def theirs(folder: Path, chip: str, kind: str, page: int, dump: Path) -> tuple[int, int]:
    """Bundles of v3's decode, its body and the loop around; in libtpu's environment."""
    import jax
    import jax.numpy as jnp

    kernel = load(folder, int(chip.removeprefix("tpu").removeprefix("v")[0]))
    H, K, D = attention.HEADS

    def array(*shape: int, dtype: Any = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    size = attention.TOKENS
    blocks = (1, size, 1, size)
    few = (8, max(page, 256), 8, max(page, 256))  # of the kernel for prompts, not looked at
    attend = partial(
        kernel.ragged_paged_attention, sm_scale=D**-0.5, d_block_sizes=blocks, m_block_sizes=few
    )
    given = (
        array(attention.ROWS, H, D, dtype=jnp.bfloat16),
        *[array(attention.ROWS, K, D, dtype=kind)] * 2,
        array(*kernel.get_kv_cache_shape(POOL, page, K, D, jnp.dtype(kind)), dtype=kind),
        *(
            array(attention.ROWS),
            array(attention.ROWS * attention.LONGEST // page),
            array(attention.ROWS + 1),
            array(3),
        ),
    )
    compile_for(chip, attend, given, donate=3)
    schedule = Schedule(dump, f"RPAd-p_{page}-bq_1_1-bkv_{size}_{size}")
    body, blocks_of_a_row, *_ = schedule.loops()
    return schedule.hot_path(body), blocks_of_a_row[1] - blocks_of_a_row[0] + 1


def ours(chip: str, kind: str, page: int, dump: Path) -> int:
    """Bundles of our decode; in libtpu's environment."""
    from octavo.pallas_kernels.attention import tpu

    D = attention.HEADS[-1]
    attend = partial(tpu.attend, window=0, scale=D**-0.5, softcap=0.0, **tpu.chip(chip))
    compile_for(chip, attend, attention.arguments(page, kind, chunk_tokens=0), donate=3)
    schedule = Schedule(dump, "tpu_decode")
    return attention.walk(schedule, attention.HEADS, page, kind, attention.LONGEST)


def one(folder: Path, chip: str, kind: str, page: int, dump: Path) -> None:
    """Print both numbers of one case as JSON."""
    print(json.dumps([ours(chip, kind, page, dump), *theirs(folder, chip, kind, page, dump)]))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("chips", nargs="*", metavar="CHIP", help=f"of {', '.join(CHIPS)}")
    parser.add_argument("--wheel", type=Path, required=True, help="a wheel, or its folder unpacked")
    parser.add_argument("--case", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if libtpu_version() is None:
        parser.error(NO_LIBTPU)
    if options.case:
        chip, kind, dump = options.chips[0], options.case[0], Path(options.case[2])
        return one(options.wheel, chip, kind, int(options.case[1]), dump)
    if unknown := set(options.chips) - set(CHIPS):
        parser.error(f"no chip {', '.join(sorted(unknown))}; there are {', '.join(CHIPS)}")
    with tempfile.TemporaryDirectory() as folder:
        wheel = options.wheel
        if wheel.is_file():
            zipfile.ZipFile(wheel).extractall(folder)
            wheel = Path(folder)
        if not wheel.joinpath(*KERNEL.split("."), "kernel.py").is_file():
            parser.error(f"{options.wheel} has no {KERNEL}; download tpu-inference's wheel")
        table(options.chips or list(CHIPS), wheel)


def table(chips: list[str], wheel: Path) -> None:
    """Each case in a process of its own: where to dump is fixed when jax is imported."""
    print(f"libtpu {libtpu_version()}, bundles per {attention.TOKENS:,} tokens")
    names = "".join(f"{name:>10}{'share':>7}" for name in ("ours", "v3", "v3 whole"))
    print(f"{'':<32}{'copies':>8}{names}")
    for chip in chips:
        for kind, page in CASES:
            with tempfile.TemporaryDirectory() as dump:
                command = [sys.executable, "-m", "octavo.bench.tpu_v3", chip, "--wheel", str(wheel)]
                done = subprocess.run(
                    [*command, "--case", kind, str(page), dump],
                    env=environment(Path(dump)),
                    stdout=subprocess.PIPE,
                    text=True,
                    check=True,
                )
            found = json.loads(done.stdout.splitlines()[-1])
            size = 1 if kind.startswith("float8") else 2
            width = 2 * attention.HEADS[1] * attention.HEADS[2]
            copies = CHIPS[chip].copy_cycles(attention.TOKENS * width * size)
            row = "".join(f"{bundles:>10,}{bundles / copies:>7.2f}" for bundles in found)
            print(f"{f'{chip} {kind} page {page}':<32}{copies:>8,.0f}{row}", flush=True)


if __name__ == "__main__":
    main()
