"""Addition and RMS norm of a few rows in one kernel on NVIDIA GPUs (Pallas, Triton lowering).

    total = x + y                                   x, y [N, E]; y may be left out
    normed = total / rms(total) * (offset + weight)

With few rows a decode step is bound by the number of its kernels: XLA makes two of this, and four
where there is one row. One program a row, read whole: with computed places instead, which a padded
row needs, the loads were an element each and the kernel slower than XLA's. The total is rounded
before it is normed, as in separate steps.
"""

# mypy: allow-untyped-calls

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

WIDEST = 16_384  # elements of a row: 64 a thread
PER_WARP = 512  # elements of a row for each warp, up to 8 warps


def why_not(x: jax.Array) -> str | None:
    """The reason this kernel refuses these rows, or None if it takes them."""
    E = x.shape[-1]
    if x.ndim != 2 or E & (E - 1) or E > WIDEST:
        return f"rows of {E} elements are no power of two up to {WIDEST}"
    return None


def add_norm(
    x: jax.Array,
    y: jax.Array | None,
    weight: jax.Array,
    eps: float,
    offset: float = 0.0,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """x, y [N, E], weight [E] -> (total, normed) [N, E], in the dtype of x. Without y the total is
    x itself. Raises ValueError where `why_not` has a reason."""
    if refusal := why_not(x):
        raise ValueError(f"the norm's kernel cannot take this: {refusal}")
    (N, E), alike = x.shape, jax.ShapeDtypeStruct(x.shape, x.dtype)
    results = pl.pallas_call(
        functools.partial(_kernel, y is not None, eps, offset),
        grid=(N,),
        out_shape=(alike,) if y is None else (alike, alike),
        compiler_params=plt.CompilerParams(num_warps=min(8, max(1, E // PER_WARP))),
        name="add_norm",
        interpret=interpret,
    )(*((x,) if y is None else (x, y)), weight)
    return (x, *results) if y is None else tuple(results)


def _kernel(added: bool, eps: float, offset: float, *refs):
    if added:
        x_ref, y_ref, weight_ref, total_ref, normed_ref = refs
    else:
        x_ref, weight_ref, normed_ref = refs
    row = pl.program_id(0)
    total = x_ref[row, :]
    if added:
        total = (total.astype(jnp.float32) + y_ref[row, :].astype(jnp.float32)).astype(total.dtype)
        total_ref[row, :] = total
    wide = total.astype(jnp.float32)
    unit = lax.rsqrt(jnp.sum(wide * wide) / wide.shape[0] + eps)
    normed = wide * unit * (offset + weight_ref[:].astype(jnp.float32))
    normed_ref[row, :] = normed.astype(normed_ref.dtype)
