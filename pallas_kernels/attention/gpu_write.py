"""Store new keys and values in their pages on NVIDIA GPUs (Pallas, Triton lowering).

    k_pages[dest // S, h, dest % S] = k[t, h]        and v alike, both in one launch

One program per (`rows` tokens, key-value head). Several tokens may share a place in the trash page
only; elsewhere each place is written once. The pages are updated in place where the caller gives
them up. Moves 2 * 2 * N * K * D * itemsize bytes.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from octavo.pallas_kernels.attention.gpu_decode import log2
from octavo.pallas_kernels.attention.reference import KV


def _kernel(dest_ref, k_ref, v_ref, k_in, v_in, k_pages, v_pages, *, S, base, rows):
    token = base + pl.program_id(1) * rows + jnp.arange(rows)
    token = jnp.minimum(token, dest_ref.shape[0] - 1)  # the tail repeats the last token
    head, K = pl.program_id(0), k_ref.shape[1]
    dest = dest_ref[token]
    where = ((dest >> log2(S)) * K + head) * S + (dest & (S - 1))
    k_pages[where] = k_ref[token, head]
    v_pages[where] = v_ref[token, head]


def write(
    cache: KV,
    k: jax.Array,
    v: jax.Array,
    dest: jax.Array,
    *,
    base: int = 0,
    rows: int = 16,
    interpret: bool = False,
) -> KV:
    """Store k, v [N, K, D], from token `base` on, at dest i32[N] = page * S + offset."""
    P, K, S, D = cache.k.shape
    flat = jax.ShapeDtypeStruct((P * K * S, D), cache.k.dtype)
    k_flat, v_flat = pl.pallas_call(
        functools.partial(_kernel, S=S, base=base, rows=rows),
        grid=(K, pl.cdiv(dest.shape[0] - base, rows)),
        out_shape=(flat, flat),
        input_output_aliases={3: 0, 4: 1},
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
        name="write_pages",
        interpret=interpret,
    )(dest, k, v, cache.k.reshape(flat.shape), cache.v.reshape(flat.shape))
    return KV(k=k_flat.reshape(P, K, S, D), v=v_flat.reshape(P, K, S, D))
