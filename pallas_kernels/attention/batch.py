"""The ragged batch: what paged attention must know of one step's tokens, for one page group.

Axis letters, the same in every file:
    B slots   M pages per slot   P pages in the pool   S tokens per page   T chunk tokens in a step
    R decode rows in this step (row r is slot r, R <= B)   Q tokens per decode row   C chunks
    N = R * Q + T tokens in this step   H query heads   K key-value heads   D head size

The N tokens lie flat: first the decode rows' (row r at r * Q), then the chunks' (chunk c at
R * Q + chunk_offset[c]). Chunks lie one behind another in the order of c; unused ones have count 0
and an offset equal to the end of the last used one. Tokens of no row and no chunk are padding:
their keys and values go to page 0, the trash page, and what they attend to is never used (but is
finite).
"""

import flax.struct
import jax


@flax.struct.dataclass
class RaggedBatch:
    """One step's tokens for one page group. Every array is int32."""

    table: jax.Array  # i32[R, M] the slots' page ids; 0 (trash) where the slot holds none
    row_start: jax.Array  # i32[R] position of the row's first token = tokens it had in the cache
    row_count: jax.Array  # i32[R] tokens of the row that count: 0 (row idle) to Q
    chunk_slot: jax.Array  # i32[C] the chunk's slot, < R
    chunk_start: jax.Array  # i32[C] position of the chunk's first token
    chunk_count: jax.Array  # i32[C] tokens in the chunk; 0 marks an unused entry
    chunk_offset: jax.Array  # i32[C] where the chunk begins among the T chunk tokens
    dest: jax.Array  # i32[N] where to write: page * S + position % S; below S for padding (trash)
    position: jax.Array  # i32[N] the token's position in its sequence
    slot: jax.Array  # i32[N] the token's slot, < R (0 for padding)
    real: jax.Array  # bool[N] False for padding
    page_size: int = flax.struct.field(pytree_node=False, default=16)  # S
    tokens_per_row: int = flax.struct.field(pytree_node=False, default=1)  # Q
