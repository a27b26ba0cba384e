"""How the rows of a grouped matmul are cut into tiles, each of one expert.

    rows       |- expert 0 -|- expert 2 -|--- expert 3 ---| past the sum |
    anywhere   |  0  |  1   |  2  |  3   |  4  |  5  |  6 |   7   |   8  |
    aligned    |   0   |  1 : 2  |   3   :  4   |   5  |6 : 7 |     8    |

A tile has at most `tile` rows. It begins anywhere, or where it is to be aligned at a multiple of
`tile`: then an expert that ends inside of a tile shares it with the next, as two entries that each
own their part of its rows. Rows past the sum of sizes are one more group, which has no expert:
whoever asks for anything finite there gets zeros. Experts without rows have no tile.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

FEWEST, MOST = (
    16,
    128,
)  # rows of a tile: the least that matrix units take, and where weights are hot


class Tiles(NamedTuple):
    """The tiles of a call, in the order of their rows; those past `used` are not in use."""

    expert: jax.Array  # i32[T] whose weight; of rows that have none the last in use
    start: jax.Array  # i32[T] the tile's first row
    begin: jax.Array  # i32[T] the rows begin..end are its own
    end: jax.Array  # i32[T]
    real: jax.Array  # i32[T] 0: its rows are past the sum of sizes
    used: jax.Array  # i32[1]


def cut(sizes: jax.Array, N: int, tile: int, *, aligned: bool) -> Tiles:
    """sizes i32[X] of N rows -> at most ceil(N / tile) + X tiles. Comparisons and sums only: no
    sort, no gather."""
    X = sizes.shape[0]
    sizes = jnp.append(sizes, N - jnp.sum(sizes)).astype(jnp.int32)
    group = jnp.arange(X + 1, dtype=jnp.int32)
    end = _running(sizes)
    begin = end - sizes
    base = begin // tile * tile if aligned else begin
    tiles = jnp.where(sizes > 0, pl.cdiv(end - base, tile), 0)
    last = _running(tiles)

    T = pl.cdiv(N, tile) + min(X + 1, N) - 1
    t = jnp.arange(T, dtype=jnp.int32)
    mine = (last - tiles <= t[:, None]) & (t[:, None] < last)  # [T, X + 1] one true at most

    def of(value: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(mine, value, 0), axis=1, dtype=jnp.int32)

    start = of(base - (last - tiles) * tile) + t * tile
    in_use = jnp.max(jnp.where((sizes > 0) & (group < X), group, 0))
    return Tiles(
        expert=jnp.minimum(of(group), in_use),
        start=start,
        begin=jnp.maximum(start, of(begin)),
        end=jnp.minimum(start + tile, of(end)),
        real=of((group < X).astype(jnp.int32)),
        used=last[-1:],
    )


def _running(counts: jax.Array) -> jax.Array:
    """The sums of the first 1, 2, ... counts, for few: a scan would be several kernels."""
    upto = jnp.tril(jnp.ones((counts.shape[0],) * 2, bool))
    return jnp.sum(jnp.where(upto, counts, 0), axis=1, dtype=jnp.int32)
