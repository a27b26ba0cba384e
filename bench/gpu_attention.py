"""How fast is attention on this NVIDIA GPU? Each kernel against float32, then timed.

    python -m octavo.bench.gpu_attention [--only decode|prefill] [--variants] [--json]

With --variants every way to build the kernels that was thought of is timed beside the default, in
turns, and pages of 8 bits too.

Times are taken inside one loop on the device, each call fed by the one before, so that no dispatch
is counted: the median of several loops. Bytes are those of the keys and values read; operations are
those of the logits and values under the diagonal.
"""

import argparse
import functools
import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from octavo.backends.gpu import capability_of
from octavo.pallas_kernels.attention import gpu
from octavo.pallas_kernels.attention.batch import RaggedBatch
from octavo.pallas_kernels.attention.gpu import Tuning
from octavo.pallas_kernels.attention.gpu_decode import DecodeTuning
from octavo.pallas_kernels.attention.gpu_hopper import HopperTuning
from octavo.pallas_kernels.attention.gpu_hopper_decode import HopperDecodeTuning
from octavo.pallas_kernels.attention.reference import KV

HEADS = (32, 8, 128)  # H, K, D: the Llama-3.1-8B shape
PAGE_SIZES = (16, 64)
SCALE = HEADS[2] ** -0.5
INT8 = 4 / 127  # the scale of keys and values in 8-bit integers


@dataclass(frozen=True)
class Shape:
    """Rows that decode over `rows` cached tokens each, or chunks of (tokens before, tokens now)."""

    name: str
    rows: tuple[int, ...] = ()
    chunks: tuple[tuple[int, int], ...] = ()
    target: float = 0.0  # GB/s of a decode, TFLOP/s of a prefill


def ragged(rows: int, mean: int) -> tuple[int, ...]:
    """Log-normal lengths: what a chat service holds."""
    lengths = np.random.default_rng(0).lognormal(0, 0.8, rows)
    return tuple(int(n) for n in 1 + lengths * mean / lengths.mean())


DECODE = (
    Shape("64 x 1,024", (1023,) * 64, target=2400),
    Shape("64 x 4,096", (4095,) * 64, target=2750),
    Shape("256 x 384", (383,) * 256, target=2750),
    Shape("256 ragged, 512", ragged(256, 512), target=2500),
    Shape("64 ragged, 1,024", ragged(64, 1024)),
    Shape("1 x 32,768", (32767,), target=2300),
    Shape("1 x 640", (639,)),
    Shape("8 ragged, 640", ragged(8, 640)),
)
PREFILL = (
    Shape("4 x 2,048", chunks=((0, 2048),) * 4, target=450),
    Shape("512 over 8,192", chunks=((8192, 512),), target=400),
    Shape("16 x 128 over 512", chunks=((512, 128),) * 16),
)

# By name: how the kernels are built, and what the pages hold.
Variants = dict[str, tuple[Tuning, str]]
BF16 = "bfloat16"


def _decode(**how: Any) -> tuple[Tuning, str]:
    return Tuning(decode=DecodeTuning(**how)), BF16


def _mosaic(**how: Any) -> tuple[Tuning, str]:
    return Tuning(hopper_decode=HopperDecodeTuning(least_rows=1, **how)), BF16


DECODE_VARIANTS: Variants = {
    "default": (Tuning(), BF16),
    "Triton": (Tuning(hopper_decode=HopperDecodeTuning(least_rows=1 << 30)), BF16),
    "Mosaic": _mosaic(),
    "Mosaic, 2 tiles": _mosaic(tiles=2),
    "Mosaic, 1,056 pairs": _mosaic(pairs=1056),
    "264 parts": _decode(parts=264),
    "1,056 parts": _decode(parts=1056),
    "fp8": (Tuning(), "float8_e4m3fn"),
    "int8": (Tuning(), "int8"),
}
PREFILL_VARIANTS: Variants = {
    "default": (Tuning(), BF16),
    "3 stages": (Tuning(hopper=HopperTuning(stages=3)), BF16),
    "fp8 by Triton": (Tuning(), "float8_e4m3fn"),
}


def _i32(values: Any) -> jax.Array:
    return jnp.asarray(values, jnp.int32)


def make(
    shape: Shape, page_size: int, seed: int = 0, pages: str = BF16
) -> tuple[RaggedBatch, jax.Array, Any, KV]:
    """A shuffled pool full of random numbers, and one step over it: batch, q, (k, v), cache.

    Pages of int8 are to be read with the scale INT8.
    """
    H, K, D = HEADS
    S, rng = page_size, np.random.default_rng(seed)
    rows = [(n, 1) for n in shape.rows] or [(0, 0)] * len(shape.chunks)
    R, T = len(rows), sum(count for _, count in shape.chunks)
    ends = [n + c for n, c in rows] if shape.rows else [n + c for n, c in shape.chunks]
    need = [-(-end // S) for end in ends]
    M, P = max(need), sum(need) + 1
    free, table = 1 + rng.permutation(P - 1), np.zeros((R, M), np.int32)
    for r, n in enumerate(need):
        table[r, :n], free = free[:n], free[n:]
    position = np.zeros(R + T, np.int32)
    slot = np.zeros(R + T, np.int32)
    real = np.zeros(R + T, bool)
    position[:R], slot[:R], real[:R] = [n for n, _ in rows], np.arange(R), bool(shape.rows)
    offset = R
    for c, (n, count) in enumerate(shape.chunks):
        at = slice(offset, offset + count)
        position[at], slot[at], real[at] = n + np.arange(count), c, True
        offset += count
    dest = np.where(real, table[slot, position // S] * S + position % S, 0)
    counts = np.array([c for _, c in shape.chunks] or [0])
    starts = [n for n, _ in shape.chunks] or [0]
    batch = RaggedBatch(
        table=_i32(table),
        row_start=_i32([n for n, _ in rows]),
        row_count=_i32([c for _, c in rows]),
        chunk_slot=_i32(np.arange(len(counts))),
        chunk_start=_i32(starts),
        chunk_count=_i32(counts),
        chunk_offset=_i32(np.cumsum(counts) - counts),
        dest=_i32(dest),
        position=_i32(position),
        slot=_i32(slot),
        real=jnp.asarray(real),
        page_size=S,
    )
    keys = jax.random.split(jax.random.key(seed, impl="rbg"), 5)  # compiles fast
    normal = functools.partial(jax.random.normal, dtype=jnp.bfloat16)
    k, v = normal(keys[0], (P, K, S, D)), normal(keys[1], (P, K, S, D))
    if pages == "int8":
        k, v = (jnp.clip(jnp.round(x / INT8), -127, 127) for x in (k, v))
    cache = KV(k=k.astype(pages), v=v.astype(pages))
    new = normal(keys[2], (R + T, K, D)), normal(keys[3], (R + T, K, D))
    return batch, normal(keys[4], (R + T, H, D)), new, cache


def repeated(step: Callable[[Any], Any], calls: int) -> Callable[[Any], Any]:
    """`calls` steps in one loop on the device.

    A turn of the loop costs about 10 us, so each holds 8 calls.
    """

    def turn(_: jax.Array, carry: Any) -> Any:
        for _unrolled in range(8):
            carry = step(carry)
        return carry

    return lambda carry: lax.fori_loop(0, calls // 8, turn, carry)


def seconds(loop: Callable[..., Any], carry: Any, rest: Any, calls: int, loops: int = 5) -> float:
    """Median seconds of one step of `repeated`."""
    carry = jax.block_until_ready(loop(carry, rest))
    taken = []
    for _ in range(loops):
        start = time.perf_counter()
        carry = jax.block_until_ready(loop(carry, rest))
        taken.append((time.perf_counter() - start) / calls)
    return float(np.median(taken))


def work(shape: Shape, itemsize: int = 2) -> float:
    """Bytes of keys and values that a decode reads, or floating point operations of a prefill."""
    H, K, D = HEADS
    if shape.rows:
        return 2 * itemsize * K * D * sum(n + 1 for n in shape.rows)
    return 4 * H * D * sum(count * n + count * (count + 1) / 2 for n, count in shape.chunks)


def checked(page_size: int, pages: str, attend: Callable[..., Any]) -> Callable[..., Any]:
    """A function of (batch, q, (k, v), cache, tokens): the relative error against the definition in
    float32 over these tokens. Pages are full of random numbers past each sequence's end too."""
    unit = INT8 if pages == "int8" else 1.0

    def check(batch: RaggedBatch, q: Any, new: Any, cache: KV, tokens: jax.Array) -> jax.Array:
        y, after = attend(q, *new, cache, batch)
        J = batch.table.shape[1] * page_size

        def one(token: jax.Array) -> jax.Array:
            where = batch.table[batch.slot[token]]
            keys, values = (
                x[where].swapaxes(0, 1).reshape(HEADS[1], 1, J, HEADS[2]).astype(jnp.float32) * unit
                for x in (after.k, after.v)
            )
            grouped = q[token].reshape(HEADS[1], -1, 1, HEADS[2]).astype(jnp.float32)
            x = jnp.sum(grouped * keys, axis=-1) * SCALE  # no matmul: exact, nothing to tune
            seen = jnp.arange(J) <= batch.position[token]
            p = jax.nn.softmax(jnp.where(seen, x, -jnp.inf), axis=-1)
            return jnp.sum(p[..., None] * values, axis=-2).reshape(HEADS[0], HEADS[2])

        want, got = lax.map(one, tokens), y[tokens].astype(jnp.float32)
        return jnp.linalg.norm(got - want) / jnp.linalg.norm(want)

    return check


def attention(tuning: Tuning, pages: str) -> Callable[..., Any]:
    """The whole call, for this device."""
    scales = {"kv_scales": jnp.full((2, HEADS[1]), INT8)} if pages == "int8" else {}
    return functools.partial(
        gpu.attend, window=0, scale=SCALE, softcap=0.0, **scales, tuning=tuning,
        capability=capability_of(jax.devices()[0]),
    )  # fmt: skip


@dataclass
class Measurement:
    """One line of the table: built first, beside others, and run alone."""

    shape: Shape
    page_size: int
    tuning: Tuning = gpu.TUNING
    pages: str = BF16
    variant: str = ""
    check: Any = None
    loop: Any = None

    @property
    def calls(self) -> int:
        return 64 if self.shape.rows else 16

    def build(self, threads: ThreadPoolExecutor) -> None:
        """Trace here, compile there."""
        attend = attention(self.tuning, self.pages)

        def loop(carry: Any, rest: Any) -> Any:
            batch, (k, v) = rest
            return repeated(lambda c: attend(c[0], k, v, c[1], batch), self.calls)(carry)

        batch, q, new, cache = jax.eval_shape(
            lambda: make(self.shape, self.page_size, 0, self.pages)
        )
        tokens = jax.eval_shape(lambda: self._tokens(np.ones(batch.real.shape)))
        check = checked(self.page_size, self.pages, attend)
        first = jax.jit(check).lower(batch, q, new, cache, tokens)
        second = jax.jit(loop, donate_argnums=0).lower((q, cache), (batch, new))
        self.check, self.loop = threads.submit(first.compile), threads.submit(second.compile)

    def _tokens(self, real: np.ndarray) -> jax.Array:
        """Some 41 of the step's tokens."""
        count = 1 if self.shape.rows and len(self.shape.rows) == 1 else 41
        found = np.flatnonzero(real)
        step = max(1, len(found) // count) | 1  # odd: no alignment hides
        return _i32(np.resize(found[::step], count))

    def run(self) -> dict[str, Any]:
        """Check, then time."""
        check, loop = self.check.result(), self.loop.result()
        inputs = make(self.shape, self.page_size, 1, self.pages)
        wrong = float(check(*inputs, self._tokens(np.asarray(inputs[0].real))))
        batch, q, new, cache = make(self.shape, self.page_size, 0, self.pages)
        taken = seconds(loop, (q, cache), (batch, new), self.calls)
        rows = bool(self.shape.rows)
        rate = work(self.shape, jnp.dtype(self.pages).itemsize) / taken / (1e9 if rows else 1e12)
        return dict(
            case=self.shape.name, page=self.page_size, us=taken * 1e6, rate=rate,
            unit="GB/s" if rows else "TFLOP/s", target=self.shape.target, error=wrong,
            variant=self.variant,
        )  # fmt: skip


HEADER = f"{'case':<20}{'page':>5}{'us':>10}{'rate':>8} unit     {'target':>7}  error"


def line(x: dict[str, Any]) -> str:
    target = f"{x['target']:.0f}" if x["target"] else "-"
    return (
        f"{x['case']:<20}{x['page']:>5}{x['us']:>10.1f}{x['rate']:>8.0f} {x['unit']:<8}"
        f"{target:>8}  {x['error']:.4f}  {x.get('variant', '')}"
    )


def variants(shapes: list[Shape], page_size: int) -> list[Measurement]:
    """Every variant on every shape that has a target."""
    return [
        Measurement(shape, page_size, tuning, pages, name)
        for shape in shapes
        if shape.target
        for name, (tuning, pages) in (DECODE_VARIANTS if shape.rows else PREFILL_VARIANTS).items()
    ]


def run_all(every: list[Measurement], show: Callable[[dict[str, Any]], None]) -> None:
    """Build in parallel, then run one by one; one that cannot be built is named."""
    with ThreadPoolExecutor(os.cpu_count() or 1) as threads:
        for one in every:
            try:
                one.build(threads)
            except Exception as failure:
                one.check = threads.submit(_fail, failure)
    for one in every:
        try:
            show(one.run())
        except Exception as failure:  # a compiler refuses it, or memory: the others go on
            said = str(failure).splitlines() or [type(failure).__name__]
            print(f"{one.shape.name}, {one.variant or 'default'}: {said[0][:140]}", flush=True)


def _fail(failure: Exception) -> None:
    raise failure


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=("decode", "prefill"))
    parser.add_argument("--variants", action="store_true", help="time every way to build them")
    parser.add_argument("--json", action="store_true", help="print one JSON document a line")
    options = parser.parse_args(arguments)
    device = jax.devices()[0]
    shapes = [s for s in DECODE if options.only != "prefill"]
    shapes += [s for s in PREFILL if options.only != "decode"]
    if not options.json:
        print(f"# attention  {device.device_kind}  jax {jax.__version__}  {HEADS=}  bfloat16")
        print(HEADER)

    def show(found: dict[str, Any]) -> None:
        print(json.dumps(found) if options.json else line(found), flush=True)

    every = [Measurement(shape, size) for shape in shapes for size in PAGE_SIZES]
    run_all(variants(shapes, PAGE_SIZES[-1]) if options.variants else every, show)


if __name__ == "__main__":
    main()
