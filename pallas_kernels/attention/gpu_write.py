"""Store new keys and values in their pages on NVIDIA GPUs (Pallas, Triton lowering).

    k_pages[dest // S, h, dest % S] = k[t, h] / scale[h]        and v alike, both in one launch

One program per (`rows` tokens, key-value head). Several tokens may share a place in the trash page
only; elsewhere each place is written once. The pages are updated in place where the caller gives
them up. Moves 2 * 2 * N * K * D * itemsize bytes.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from octavo.pallas_kernels.attention.gpu_decode import kept, log2
from octavo.pallas_kernels.attention.reference import KV


def _kernel(dest_ref, k_ref, v_ref, *refs, S, base, rows, scaled):
    *given, _k_in, _v_in, k_pages, v_pages = refs
    token = base + pl.program_id(1) * rows + jnp.arange(rows)
    token = jnp.minimum(token, dest_ref.shape[0] - 1)  # the tail repeats the last token
    head, K = pl.program_id(0), k_ref.shape[1]
    dest = dest_ref[token]
    where = ((dest >> log2(S)) * K + head) * S + (dest & (S - 1))
    scales = (given[0][0, head], given[0][1, head]) if scaled else (None, None)
    k_pages[where] = kept(k_ref[token, head], scales[0], k_pages.dtype)
    v_pages[where] = kept(v_ref[token, head], scales[1], v_pages.dtype)


def write(
    cache: KV,
    k: jax.Array,
    v: jax.Array,
    dest: jax.Array,
    kv_scales: jax.Array | None = None,
    *,
    base: int = 0,
    rows: int = 16,
    interpret: bool = False,
) -> KV:
    """Store k, v [N, K, D], from token `base` on, at dest i32[N] = page * S + offset.

    kv_scales f32[2, K]: what they are divided by first.
    """
    P, K, S, D = cache.k.shape
    flat = jax.ShapeDtypeStruct((P * K * S, D), cache.k.dtype)
    given = () if kv_scales is None else (kv_scales,)
    first = 3 + len(given)  # where the pages are among the arguments
    scaled = kv_scales is not None
    k_flat, v_flat = pl.pallas_call(
        functools.partial(_kernel, S=S, base=base, rows=rows, scaled=scaled),
        grid=(K, pl.cdiv(dest.shape[0] - base, rows)),
        out_shape=(flat, flat),
        input_output_aliases={first: 0, first + 1: 1},
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
        name="write_pages",
        interpret=interpret,
    )(dest, k, v, *given, cache.k.reshape(flat.shape), cache.v.reshape(flat.shape))
    return KV(k=k_flat.reshape(P, K, S, D), v=v_flat.reshape(P, K, S, D))
