"""Random numbers without state: an integer hash of who asks, and where.

    bits(row, id) = mix(mix(id + a) ^ b)        a, b u32: two hashes of (seed, choice, position)
    gumbel = -log(-log1p(-w))                   w = (bits + 1/2) / 2^32

A number depends on the request's seed, which of its choices this is, the position of the token and
the vocabulary id, and on nothing else: not on the row, the batch, the bucket, or which shard holds
the id. The bits are the same on every backend; the logarithms agree to their last digits.

`mix` is a bijection of 32 bits in which every input bit reaches every output bit (two rounds of
xor-shift and odd multiplication, with the constants of the 32-bit Murmur 3 finalizer). Counting w
from 0 keeps the full resolution of float32 where it matters: in the largest of many numbers.
"""

import jax
import jax.numpy as jnp

_SALTS = (0x9E3779B9, 0x7F4A7C15)  # of a and b: any two different numbers do


def mix(x: jax.Array) -> jax.Array:
    """A well-mixed bijection of u32."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def stream(seed: jax.Array, choice: jax.Array, position: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The two u32[R] that a token's numbers come from: seed u32[R, 2], choice, position i32[R]."""
    parts = (seed[:, 0], seed[:, 1], choice.astype(jnp.uint32), position.astype(jnp.uint32))

    def fold(salt: int) -> jax.Array:
        state = jnp.full_like(parts[0], salt)
        for part in parts:  # the addition keeps 0 from being a fixed point of the chain
            state = mix(state ^ part) + jnp.uint32(salt)
        return mix(state)

    return fold(_SALTS[0]), fold(_SALTS[1])


def bits(
    seed: jax.Array, choice: jax.Array, position: jax.Array, vocabulary: jax.Array
) -> jax.Array:
    """u32[R, V] for vocabulary ids i32[V] (a shard passes the ids it holds)."""
    a, b = stream(seed, choice, position)
    return mix(mix(vocabulary.astype(jnp.uint32)[None] + a[:, None]) ^ b[:, None])


def gumbel(
    seed: jax.Array, choice: jax.Array, position: jax.Array, vocabulary: jax.Array
) -> jax.Array:
    """Standard Gumbel noise f32[R, V], finite."""
    hashed = bits(seed, choice, position, vocabulary)
    # Exact up to the one rounding to float32; the largest values would round to 1.
    w = jnp.minimum((hashed.astype(jnp.float32) + 0.5) * 2.0**-32, 1 - 2.0**-24)
    # log(1 - w); where w is small the sum loses its digits, and the series has them.
    small = w * (1 + w * (0.5 + w * (1 / 3 + w * (0.25 + w * 0.2))))
    return -jnp.log(jnp.where(w < 1 / 32, small, -jnp.log(1 - w)))
