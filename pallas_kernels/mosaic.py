"""What our kernels for Hopper share (Pallas, Mosaic GPU)."""

# mypy: allow-untyped-calls

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

PROGRAMS = 132  # multiprocessors of an H100; each keeps one program from beginning to end
SLICE = 64  # columns of a swizzled tile: 128 bytes of 16-bit numbers


def writes_through_references() -> bool:
    """Whether a kernel inside `jit` can write to a reference made there: jax 0.11 and later."""
    return tuple(int(n) for n in jax.__version__.split(".")[:2]) >= (0, 11)


def tiled():
    """How 16-bit tiles lie in shared memory for a wgmma: 8 rows of a slice together, swizzled."""
    return plgpu.TilingTransform((8, SLICE)), plgpu.SwizzleTransform(128)


def compiler_params():
    """No barriers but our own: what threads read in shared memory they commit, or wait for."""
    return plgpu.CompilerParams(
        approx_math=True,
        lowering_semantics=plgpu.LoweringSemantics.Lane,
        unsafe_no_auto_barriers=True,
    )


def one_if(condition):
    """i32: 1 where it is true, else 0, without a cast. For one from a truth value jax asks ptxas,
    in a process of its own, for its version: 12 ms each, when a program is traced (jax 0.11.2)."""
    return jnp.where(condition, 1, 0)


def when(condition):
    """`pl.when` without the cast of `lax.cond`, see `one_if`; 40 of them were half a second of each
    program with prompt tokens."""

    def decorate(body):
        lax.switch(one_if(condition), (lambda: None, body))

    return decorate


def transposed(ref):
    """A view of a tile with its axes exchanged."""
    return ref.transpose((1, 0)) if hasattr(ref, "transpose") else plgpu.transpose_ref(ref, (1, 0))


def put(ref, value):
    """Store registers in shared memory whose rows lie one behind another, as copies of any number
    of them need. Banks conflict there, which jax 0.12 wants to hear is meant."""
    store = getattr(plgpu, "store", None)
    if store is None:
        ref[...] = value
    else:
        store(ref, value, optimized=False)


def over_warps_scratch(columns: int) -> int:
    """float32 places that `over_warps` needs: a pair of columns of 32 lanes of four warps, for each
    eight columns."""
    return columns * 32


def over_warps(op: str, x, scratch, interpret: bool):
    """The "max" or sum ("add") of f32[M, N] in a wgmma's layout over axis 0, which lies over warps.

    Pallas itself would give every warpgroup the same scratch, over which two would race.
    """
    if interpret:
        return x.max(axis=0) if op == "max" else x.sum(axis=0)
    layout: Any = plgpu.Layout.WGMMA
    result = plgpu.ShapeDtypeStruct(x.shape[1:], jnp.float32, layout.reduce(0))
    inline = plgpu.inline_mgpu(arg_types=(layout, plgpu.RefType()), return_type=result)
    return inline(lambda _, x, scratch: x.reduce(op, 0, scratch))(x, scratch)
