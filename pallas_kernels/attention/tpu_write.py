"""Store the tokens of prompt chunks in their pages on a TPU.

XLA lays the new tokens out as the pages they will be (an image of each touched page). A page that a
chunk covers whole is one copy from image to page; of a page that it covers in part, the old tokens
are read and kept. A chunk has at most two of the latter.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from octavo.pallas_kernels.attention.batch import RaggedBatch
from octavo.pallas_kernels.attention.tpu_layout import Layout

IN_FLIGHT = 16  # copies of whole pages


def _kernel(
    touched: Any,  # SMEM i32[2] how many pages, the layer
    page: Any,  # SMEM i32[U]
    begin: Any,  # SMEM i32[U] the rows begin..end of the page are new
    end: Any,  # SMEM i32[U]
    images: Any,  # HBM [U, tiles, S, W]
    pages_in: Any,  # HBM [L, P, tiles, S, W], aliased with `pages`
    pages: Any,
    old: Any,  # VMEM [tiles, S, W]
    new: Any,  # VMEM [tiles, S, W]
    whole_sem: Any,
    sems: Any,
) -> None:
    del pages_in
    S, layer = old.shape[1], touched[1]

    def whole(u: Any) -> Any:
        return pltpu.make_async_copy(images.at[u], pages.at[layer, page[u]], whole_sem)

    def merge(u: Any) -> None:
        copies = [
            pltpu.make_async_copy(pages.at[layer, page[u]], old, sems.at[0]),
            pltpu.make_async_copy(images.at[u], new, sems.at[1]),
        ]
        for copy in copies:
            copy.start()
        for copy in copies:
            copy.wait()
        row = jax.lax.broadcasted_iota(jnp.int32, old.shape[1:], 0)
        mine = (row >= begin[u]) & (row < end[u])
        for tile in range(old.shape[0]):
            both = (new[tile].astype(jnp.float32), old[tile].astype(jnp.float32))
            old[tile] = jnp.where(mine, *both).astype(old.dtype)
        back = pltpu.make_async_copy(old, pages.at[layer, page[u]], sems.at[0])
        back.start()
        back.wait()

    def step(u: Any, flying: Any) -> Any:
        covered = end[u] - begin[u] == S

        @pl.when(covered & (flying == IN_FLIGHT))
        def _() -> None:
            whole(u).wait()

        @pl.when(covered)
        def _() -> None:
            whole(u).start()

        @pl.when(~covered)
        def _() -> None:
            merge(u)

        return jnp.minimum(flying + covered.astype(jnp.int32), IN_FLIGHT)

    flying = jax.lax.fori_loop(0, touched[0], step, jnp.int32(0))

    def drain(_: Any, carry: None) -> None:
        whole(0).wait()

    jax.lax.fori_loop(0, flying, drain, None)


def write(
    k: jax.Array,
    v: jax.Array,
    pages: jax.Array,
    layer: jax.Array,
    batch: RaggedBatch,
    *,
    layout: Layout,
    interpret: Any = False,
) -> jax.Array:
    """Store the T chunk tokens k, v [T, K, D] in a layer of pages [L, P, tiles, S, W], in place."""
    T, S = k.shape[0], pages.shape[3]
    start, count = batch.chunk_start, batch.chunk_count
    C = start.shape[0]
    U = T // S + 2 * C  # count tokens touch at most (count - 2) // S + 2 pages
    pieces = jnp.where(count > 0, (start + count - 1) // S - start // S + 1, 0)
    ends = jnp.cumsum(pieces)
    u = jnp.arange(U, dtype=jnp.int32)
    chunk = jnp.minimum(jnp.sum(u[:, None] >= ends[None], axis=1), C - 1)
    j = jnp.clip(start[chunk] // S + u - (ends - pieces)[chunk], 0, batch.table.shape[1] - 1)
    page = batch.table[batch.chunk_slot[chunk], j]
    token = j * S - start[chunk]  # of the chunk, that falls on the page's first row
    begin = jnp.maximum(-token, 0)
    end = jnp.minimum(count[chunk] - token, S)
    rows = (batch.chunk_offset[chunk] + token)[:, None] + jnp.arange(S, dtype=jnp.int32)
    new = layout.new_rows(k, v).astype(pages.dtype)  # [T, tiles, W]
    images = new[jnp.clip(rows, 0, T - 1)].swapaxes(1, 2)
    hbm, smem = pl.BlockSpec(memory_space=pl.ANY), pl.BlockSpec(memory_space=pltpu.SMEM)
    scratch = pltpu.VMEM(pages.shape[2:], pages.dtype)
    return pl.pallas_call(
        _kernel,
        name="tpu_write",
        in_specs=[smem] * 4 + [hbm] * 2,
        out_specs=hbm,
        out_shape=jax.ShapeDtypeStruct(pages.shape, pages.dtype),
        input_output_aliases={5: 0},
        scratch_shapes=[
            scratch,
            scratch,
            pltpu.SemaphoreType.DMA,
            pltpu.SemaphoreType.DMA((2,)),
        ],
        compiler_params=pltpu.CompilerParams(disable_bounds_checks=True),
        interpret=interpret,
    )(jnp.append(ends[-1:], layer).astype(jnp.int32), page, begin, end, images, pages)
