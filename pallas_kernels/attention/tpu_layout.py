"""How a TPU keeps keys and values: one array a layer, one copy a page, heads in pairs.

    pages [P, tiles, S, W]     a page is contiguous: one DMA brings the keys and values of all heads

    D <= 64    tiles = K      row = key in lanes 0..63, value in lanes 64..127        W = 128
    D <= 128   tiles = 2 K    K tiles of keys, then K tiles of values                  W = 128
    D <= 256   tiles = 2 K    likewise                                                 W = 256

The matrix unit contracts 256 lanes at once. Two heads of 128 lanes side by side are therefore one
operand, a unit; the queries of its heads lie on the diagonal, zeros elsewhere:

            lanes of head 0   lanes of head 1
    rows 0..G-1    q            0              logits of head 0
    rows G..2G-1   0            q              logits of head 1

so that G rows of each head fill the 8 sublanes of a register. The product with the values gives
each row both heads' sums; the other head's are dropped at the end.
"""

from dataclasses import dataclass

import flax.struct
import jax
import jax.numpy as jnp

LANES = 128
SUBLANES = 8


@flax.struct.dataclass
class TpuKV:
    """One layer's pages; or those of all layers of a group, and which layer is meant."""

    pages: jax.Array  # [P, tiles, S, W], or [L, P, tiles, S, W]
    layer: jax.Array | None = None  # i32[] of the L; None with [P, tiles, S, W], and at rest

    def at(self, layer: jax.Array) -> "TpuKV":
        """The same pages, seen by one layer."""
        return TpuKV(self.pages, layer)


@dataclass(frozen=True)
class Layout:
    """The static shapes of one model's heads."""

    kv_heads: int  # K
    group: int  # G query heads per KV head
    head_size: int  # D

    @property
    def width(self) -> int:
        """W lanes of a row of a page."""
        return LANES if self.head_size <= LANES else 2 * LANES

    @property
    def shared(self) -> bool:
        """Keys and values lie in one row."""
        return self.head_size <= LANES // 2

    @property
    def tiles(self) -> int:
        """[S, W] tiles of a page."""
        return self.kv_heads if self.shared else 2 * self.kv_heads

    @property
    def pair(self) -> int:
        """KV heads of a unit."""
        return 2 if self.width == LANES and self.kv_heads % 2 == 0 else 1

    @property
    def units(self) -> int:
        return self.kv_heads // self.pair

    @property
    def lanes(self) -> int:
        """Lanes of a unit's operand."""
        return self.pair * self.width

    @property
    def rows(self) -> int:
        """Query rows of a unit, whole registers."""
        return -(-self.pair * self.group // SUBLANES) * SUBLANES

    @property
    def value_lane(self) -> int:
        """Where a value begins in its row."""
        return LANES // 2 if self.shared else 0

    def key_tiles(self, unit: int) -> list[int]:
        return [self.pair * unit + i for i in range(self.pair)]

    def value_tiles(self, unit: int) -> list[int]:
        first = 0 if self.shared else self.kv_heads
        return [first + tile for tile in self.key_tiles(unit)]

    def new_rows(self, k: jax.Array, v: jax.Array) -> jax.Array:
        """k, v [N, K, D] -> [N, tiles, W], as a page holds them."""
        if self.shared:
            half = [(0, 0), (0, 0), (0, LANES // 2 - self.head_size)]
            return jnp.concatenate([jnp.pad(k, half), jnp.pad(v, half)], axis=2)
        full = [(0, 0), (0, 0), (0, self.width - self.head_size)]
        return jnp.concatenate([jnp.pad(k, full), jnp.pad(v, full)], axis=1)

    def queries(self, q: jax.Array) -> jax.Array:
        """q [N, H, D] -> [N, units, rows, lanes], each head in its own lanes."""
        N = q.shape[0]
        heads = q.reshape(N, self.units, self.pair, self.group, self.head_size)
        heads = jnp.pad(heads, [(0, 0)] * 4 + [(0, self.width - self.head_size)])
        diagonal = jnp.eye(self.pair, dtype=q.dtype)[:, None, :, None]
        spread = heads[:, :, :, :, None, :] * diagonal  # [N, units, pair, G, pair, W]
        flat = spread.reshape(N, self.units, self.pair * self.group, self.lanes)
        return jnp.pad(flat, [(0, 0), (0, 0), (0, self.rows - flat.shape[2]), (0, 0)])

    def heads(self, y: jax.Array) -> jax.Array:
        """y [N, units, rows, lanes] -> [N, H, D]: each head's own lanes."""
        N = y.shape[0]
        real = y[:, :, : self.pair * self.group]
        spread = real.reshape(N, self.units, self.pair, self.group, self.pair, self.width)
        own = jnp.stack([spread[:, :, i, :, i] for i in range(self.pair)], axis=2)
        own = own[..., self.value_lane : self.value_lane + self.head_size]
        return own.reshape(N, self.kv_heads * self.group, self.head_size)


def divide(work: jax.Array, used: jax.Array, parts: int) -> jax.Array:
    """Cut a list into runs of about the same work: i32[parts + 1], each run's first and the end.

    work i32[n], 0 from item `used` i32[] on. An item is in the run where its middle lies.
    """
    upto = jnp.cumsum(work)
    edges = 2 * upto[-1] * jnp.arange(parts, dtype=jnp.int32)[:, None]
    behind = jnp.sum((2 * upto - work) * parts >= edges, axis=1)
    begin = jnp.minimum(work.shape[0] - behind, used)
    return jnp.append(begin, used).astype(jnp.int32)


def init_kv(
    pages: int,
    page_size: int,
    kv_heads: int,
    head_size: int,
    dtype: jax.typing.DTypeLike,
    layers: int = 0,
) -> TpuKV:
    """Empty pages of one layer, or with `layers` of that many; `pages` includes the trash page."""
    layout = Layout(kv_heads, 1, head_size)
    page = (layout.tiles, page_size, layout.width)
    return TpuKV(jnp.zeros((layers, pages, *page) if layers else (pages, *page), dtype))
