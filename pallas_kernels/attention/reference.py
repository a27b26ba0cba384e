"""Ragged paged attention: what it means. Every implementation is tested against this file.

A token t of slot b at position p writes its key and value to page table[b, p // S], offset p % S,
and then attends to the positions j of its own slot with

    p - window < j <= p                      (window 0: 0 <= j <= p)
    y[t, h] = sum_j softmax_j(cap(scale * q[t, h] . k[j, h // (H / K)])) v[j, h // (H / K)]
    cap(x) = softcap * tanh(x / softcap)     (softcap 0: cap(x) = x)

`sinks` f32[H]: the softmax of head h has one more logit, sinks[h], that has no value.
`kv_scales` f32[2, K]: a key (row 0) or value (row 1) of head k is kept divided by its scale and
multiplied with it where it is read. What 8 bits cannot hold is saturated.

    table [R, M]        one layer's cache, k and v alike [P, K, S, D]
    slot 0: 7 2 .       page 0  trash: padding writes here, nothing depends on it
    slot 1: 4 . .       page 2  positions S..2S-1 of slot 0, one [S, D] tile per KV head
                        page 7  positions 0..S-1 of slot 0

Heads lie outside a page's tokens: a gathered page is then the right operand of a matmul as it is.
All arithmetic is float32, whatever the dtype of the cache. This file gathers each token's whole
table, so it is for tests and for reading.
"""

import flax.struct
import jax
import jax.numpy as jnp

from octavo.pallas_kernels.attention.batch import RaggedBatch

MASKED = -1e30  # a logit no softmax sees; finite, so that rows without any key stay finite


# A pool may keep the bits of small floats as whole numbers of that width, for XLA:CPU makes float32
# of a whole pool before it scatters anything else into it, and small floats of it again.
BITS = {"bfloat16": "uint16", "float16": "int16", "float8_e4m3fn": "uint8"}
FLOATS = {bits: float_ for float_, bits in BITS.items()}


@flax.struct.dataclass
class KV:
    """One layer's pages."""

    k: jax.Array  # [P, K, S, D]
    v: jax.Array  # [P, K, S, D]


def init_kv(
    pages: int, page_size: int, kv_heads: int, head_size: int, dtype: jax.typing.DTypeLike
) -> KV:
    """One layer's empty pages, the trash page included in `pages`."""
    shape = (pages, kv_heads, page_size, head_size)
    return KV(k=jnp.zeros(shape, dtype), v=jnp.zeros(shape, dtype))


def floats(x: jax.Array) -> jax.Array:
    """What was read of a pool, as float32."""
    kind = FLOATS.get(x.dtype.name)
    return (x if kind is None else jax.lax.bitcast_convert_type(x, kind)).astype(jnp.float32)


def stored(x: jax.Array, scales: jax.Array | None, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Keys or values x [N, K, D] as a cache of `dtype` keeps them; scales f32[K]."""
    kind = FLOATS.get(jnp.dtype(dtype).name)
    if kind is not None:
        return jax.lax.bitcast_convert_type(stored(x, scales, kind), dtype)
    if scales is not None:
        x = x.astype(jnp.float32) / scales[:, None]
    if jnp.dtype(dtype).itemsize > 1:
        return x.astype(dtype)
    if jnp.issubdtype(dtype, jnp.integer):
        return jnp.clip(jnp.round(x), -127, 127).astype(dtype)
    most = float(jnp.finfo(dtype).max)
    return jnp.clip(x, -most, most).astype(dtype)


def write(
    cache: KV, k: jax.Array, v: jax.Array, dest: jax.Array, kv_scales: jax.Array | None = None
) -> KV:
    """Store k, v [N, K, D] at dest i32[N] = page * S + offset; in place where the cache is donated.

    Several tokens may share a place in the trash page only.
    """
    scales = (None, None) if kv_scales is None else kv_scales
    k, v = stored(k, scales[0], cache.k.dtype), stored(v, scales[1], cache.v.dtype)
    if dest.shape[0] == 1:
        # XLA turns a scatter of one token into updates that copy whole pools. So the token is
        # written to the trash page too, first.
        k, v, dest = (jnp.concatenate([new, new]) for new in (k, v, dest))
        dest = dest * jnp.arange(2, dtype=dest.dtype)
    size = cache.k.shape[2]
    page, offset = dest >> (size.bit_length() - 1), dest & (size - 1)

    def put(pages: jax.Array, new: jax.Array) -> jax.Array:
        return pages.at[page, :, offset].set(new, mode="promise_in_bounds")

    return KV(k=put(cache.k, k), v=put(cache.v, v))


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cache: KV,
    batch: RaggedBatch,
    *,
    window: int,
    scale: float,
    softcap: float,
    sinks: jax.Array | None = None,
    kv_scales: jax.Array | None = None,
) -> tuple[jax.Array, KV]:
    """Write, then attend. q [N, H, D], k and v [N, K, D] -> [N, H, D] in the dtype of q."""
    cache = write(cache, k, v, batch.dest, kv_scales)
    N, H, D = q.shape
    K = k.shape[1]
    pages = batch.table[batch.slot]  # [N, M]
    scales = jnp.ones((2, K)) if kv_scales is None else kv_scales

    def gather(pool: jax.Array, scales: jax.Array) -> jax.Array:
        tiles = pool[pages].astype(jnp.float32)  # [N, M, K, S, D]
        return tiles.swapaxes(1, 2).reshape(N, K, -1, D) * scales[:, None, None]

    grouped = q.astype(jnp.float32).reshape(N, K, H // K, D) * scale
    logits = jnp.einsum("nkgd,nkjd->nkgj", grouped, gather(cache.k, scales[0]))
    if softcap:
        logits = softcap * jnp.tanh(logits / softcap)
    j = jnp.arange(logits.shape[-1])[None]
    position = batch.position[:, None]
    seen = j <= position
    if window:
        seen &= j > position - window
    logits = jnp.where(seen[:, None, None], logits, MASKED)
    extra = 0 if sinks is None else 1
    if sinks is not None:
        own = jnp.broadcast_to(sinks.reshape(K, H // K, 1), (*logits.shape[:-1], 1))
        logits = jnp.concatenate([logits, own], axis=-1)
    weight = jax.nn.softmax(logits, axis=-1)[..., : logits.shape[-1] - extra]
    y = jnp.einsum("nkgj,nkjd->nkgd", weight, gather(cache.v, scales[1]))
    return y.reshape(N, H, D).astype(q.dtype), cache
