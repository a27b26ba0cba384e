"""Grouped matmul on a TPU.

    y[n] = x[n] @ weight[expert of n]                x [N, in] sorted by expert, weight [Y, in, out]

The grid is blocks of columns, and for each of them the tiles of rows (tiles.py), aligned:

    tile      0      1      2      3       4
    expert    0      0      2      3       3
    rows    0-127 128-140 141-255 256-383 384-511
    weight  .. 0  |            2  |     3       |  the next block of columns of 0

Tiles 1 and 2 are the same rows of x and y, which stay in VMEM between them; each writes the rows
that it owns. An expert's weight is copied once for all its tiles, and that of the next expert with
rows starts as soon as the buffer of the one before it is free: the pipeline that comes with the
grid would leave the memory idle in all but the last tile of each expert. `in` is never cut, so a
product is complete when it is made. The number of tiles is known when it runs: no step is empty.

VMEM: 2 buffers of weights, 2 tiles of x and 2 of y.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from octavo.pallas_kernels.grouped.tiles import cut

LANES = 128
TILE = 128  # rows; a product of 16 takes three quarters of its time
PART = 256  # columns of one product: a matrix unit is as wide
UNROLLED = 28672  # depth of products in one stretch of code; longer ones compile for long
FEW = 512  # rows up to which all wait for the first weight, and x is nothing to read again
BLOCK = {True: 3 << 20, False: 15 << 20}  # bytes of a buffer of weights, at most; by whether few
LARGEST = 6 << 20  # bytes of the smallest block, so that two and as deep tiles of x fit
VMEM = 48 << 20  # v5p and tpu7x have 64 MiB a core


def why_not(x: jax.Array, weight: jax.Array) -> str | None:
    """The reason this kernel refuses these arguments, or None if it takes them."""
    if x.dtype != weight.dtype or x.dtype not in (jnp.bfloat16, jnp.float32):
        return f"rows are {x.dtype} and weights {weight.dtype}, not both bfloat16 or float32"
    if weight.ndim not in (3, 4):
        return f"weights have {weight.ndim} axes, neither 3 nor 4"
    if weight.ndim == 4 and weight.shape[3] != LANES:
        return f"blocks of weights have {weight.shape[3]} columns, not {LANES}"
    size = _columns(weight, 1) * weight.shape[-2] * weight.dtype.itemsize
    if size > LARGEST:
        return f"the smallest block of weights has {size:,} bytes, more than {LARGEST:,}"
    return None


def grouped_linear(
    x: jax.Array,
    weight: jax.Array,
    sizes: jax.Array,
    first: jax.Array | int = 0,
    *,
    interpret: Any = False,
) -> jax.Array:
    """x [N, in] sorted by expert, weight [Y, in, out] or [Y, blocks, in, 128], sizes i32[X] ->
    [N, out]; the X experts begin at weight[first]. Rows past the sum of sizes give 0. Raises
    ValueError where `why_not` has a reason."""
    if refusal := why_not(x, weight):
        raise ValueError(f"the kernel for experts cannot take this: {refusal}")
    N, depth = x.shape
    tile, columns = min(TILE, N), block_columns(weight, N)
    out = _width(weight)
    expert, start, begin, end, real, count = cut(sizes, N, tile, aligned=True)
    turn, after = _turns(expert, count)
    blocked = weight.ndim == 4
    block = (columns // LANES, depth, LANES) if blocked else (depth, columns)
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=7,
        grid=(out // columns, count[0]),
        in_specs=[
            pl.BlockSpec((tile, depth), lambda c, t, start, *_: (start[t] // tile, 0)),
            pl.BlockSpec(memory_space=pl.ANY),
        ],
        out_specs=pl.BlockSpec((tile, columns), lambda c, t, start, *_: (start[t] // tile, c)),
        scratch_shapes=[pltpu.VMEM((2, *block), weight.dtype), pltpu.SemaphoreType.DMA((2,))],
    )
    return pl.pallas_call(
        functools.partial(_kernel, blocked=blocked),
        name="tpu_grouped",
        grid_spec=grid,
        out_shape=jax.ShapeDtypeStruct((N, out), x.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary", "arbitrary"), vmem_limit_bytes=VMEM
        ),
        interpret=interpret,
    )(start, begin, end, real, expert + first, turn, after + first, x, weight)


def block_columns(weight: jax.Array, N: int) -> int:
    """Columns of the blocks that a call with N rows copies."""
    return _columns(weight, BLOCK[N <= FEW])


def loops(columns: int, depth: int) -> int:
    """How often the loop over the whole products of a block turns; 0 where there are none."""
    count = columns // PART
    return count // _most(count, max(1, UNROLLED // depth)) if count else 0


def _turns(expert: jax.Array, count: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of the tiles' experts: i32[T + 1] how many others came before, at T how many there are; and
    i32[T] the expert that follows, behind the last the first."""
    T = expert.shape[0]
    t = jnp.arange(T, dtype=jnp.int32)
    new = (t > 0) & (t < count) & (expert != jnp.roll(expert, 1))
    turn = jnp.sum(jnp.where(new & (t <= t[:, None]), 1, 0), axis=1, dtype=jnp.int32)
    later = new & (t > t[:, None])  # experts ascend: the next is the least
    after = jnp.min(jnp.where(later, expert, jnp.iinfo(jnp.int32).max), axis=1)
    after = jnp.where(jnp.any(later, axis=1), after, expert[0])
    return jnp.append(turn, jnp.sum(new, dtype=jnp.int32) + 1), after


def _kernel(
    # SMEM i32[T]
    start: Any,
    begin: Any,
    end: Any,
    real: Any,
    expert: Any,
    turn: Any,  # i32[T + 1]
    after: Any,
    x: Any,  # VMEM [tile, in]
    weight: Any,  # HBM [Y, in, out] or [Y, blocks, in, 128]
    y: Any,  # VMEM [tile, columns]
    buffer: Any,  # VMEM [2, in, columns] or [2, columns / 128, in, 128]
    sem: Any,
    *,
    blocked: bool,
) -> None:
    c, t = pl.program_id(0), pl.program_id(1)
    (tile, columns), turns = y.shape, turn[turn.shape[0] - 1]
    place = c * turns + turn[t]  # among all copies
    slot = place % 2

    def copy(e: Any, c: Any, slot: Any) -> Any:
        if blocked:
            source = weight.at[e, pl.ds(c * (columns // LANES), columns // LANES)]
        elif columns == weight.shape[2]:  # which need not be whole lanes
            source = weight.at[e]
        else:
            source = weight.at[e, :, pl.ds(pl.multiple_of(c * columns, LANES), columns)]
        return pltpu.make_async_copy(source, buffer.at[slot], sem.at[slot])

    @pl.when((c == 0) & (t == 0))
    def _() -> None:
        copy(expert[0], 0, 0).start()

    @pl.when((t == 0) | (turn[t] != turn[jnp.maximum(t - 1, 0)]))
    def _() -> None:
        @pl.when(place + 1 < pl.num_programs(0) * turns)
        def _() -> None:
            copy(after[t], c + (turn[t] + 1 == turns).astype(jnp.int32), 1 - slot).start()

        copy(expert[t], c, slot).wait()

    def keep(here: Any, width: int, new: jax.Array | float) -> None:
        row = start[t] + jax.lax.broadcasted_iota(jnp.int32, (tile, width), 0)
        mine = (row >= begin[t]) & (row < end[t])
        old = y[:, here].astype(jnp.float32)  # v5e selects among 32 bits only
        y[:, here] = jnp.where(mine, new, old).astype(y.dtype)

    def multiply(at: Any, width: int) -> None:
        here = pl.ds(at, width)
        if blocked:
            lanes = [buffer[slot, at // LANES + j] for j in range(width // LANES)]
            w = jnp.concatenate(lanes, axis=1)
        else:
            w = buffer[slot, :, here]
        keep(here, width, _dot(x[...], w))

    @pl.when(real[t] == 1)
    def _() -> None:
        count, rest = divmod(columns, PART)
        if count:
            jax.lax.fori_loop(
                0,
                count,
                lambda i, _: multiply(pl.multiple_of(i * PART, PART), PART),
                None,
                unroll=count // loops(columns, x.shape[1]),
            )
        if rest:
            multiply(count * PART, rest)

    @pl.when(real[t] == 0)
    def _() -> None:
        keep(slice(None), columns, 0.0)


def _dot(x: jax.Array, w: jax.Array) -> jax.Array:
    """x @ w, accumulated in float32; float32 stays float32."""
    exact = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    dims = (((1,), (0,)), ((), ()))
    return jax.lax.dot_general(x, w, dims, precision=exact, preferred_element_type=jnp.float32)


def _width(weight: jax.Array) -> int:
    return weight.shape[1] * LANES if weight.ndim == 4 else weight.shape[2]


def _columns(weight: jax.Array, most: int) -> int:
    """Columns of a block: as many whole lanes as divide the width and have `most` bytes, at least
    one; or all."""
    width, depth = _width(weight), weight.shape[-2]
    if width % LANES:
        return width
    lanes, fits = width // LANES, most // (depth * LANES * weight.dtype.itemsize)
    return LANES * _most(lanes, max(1, fits))


def _most(count: int, most: int) -> int:
    """The largest divisor of `count` that is at most `most`."""
    return max(n for n in range(1, most + 1) if count % n == 0)
