"""What our kernels for Hopper share (Pallas, Mosaic GPU)."""

# mypy: allow-untyped-calls

import jax
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
