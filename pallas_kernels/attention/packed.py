"""Attention inside rows of whole texts: no cache, no pages. Plain jnp, for every backend.

    segment i32[A, W]   A rows of W tokens; texts lie one behind another in a row

        row 0   1 1 1 1 1 2 2 2 0 0     a token sees the tokens with its own number,
        row 1   3 3 3 3 3 3 3 3 3 4     causal: those up to itself; 0 is padding

A text never crosses rows, so the work is N * W for N = A * W tokens. Long rows go by blocks of
queries, so that the logits in memory stay below `MOST_LOGITS`.
"""

import jax
import jax.numpy as jnp

MASKED = -1e30  # finite: a row of padding alone must not become NaN
MOST_LOGITS = 1 << 24  # of one block of queries, all rows and heads: 64 MiB in float32


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment: jax.Array,
    *,
    causal: bool,
    window: int,
    scale: float,
    softcap: float = 0.0,
) -> jax.Array:
    """q [N, H, D], k and v [N, K, D] -> [N, H, D] in the dtype of q.

    A window is the tokens that a query sees, itself included; 0 is no window. It needs `causal`.
    """
    A, W = segment.shape
    N, H, D = q.shape
    K = k.shape[1]
    G = H // K
    # [A, K, G, W, D] and [A, K, W, D]: the matmuls' own order.
    queries = q.reshape(A, W, K, G, D).transpose(0, 2, 3, 1, 4)
    keys, values = (x.reshape(A, W, K, D).transpose(0, 2, 1, 3) for x in (k, v))
    block = W
    while block > 1 and A * H * block * W > MOST_LOGITS:
        block //= 2

    def some(first: jax.Array | int) -> jax.Array:
        """The queries first ... first + block of every row: [A, K, G, block, D]."""
        mine = jax.lax.dynamic_slice_in_dim(queries, first, block, 3)
        own = jax.lax.dynamic_slice_in_dim(segment, first, block, 1)
        seen = own[:, :, None] == segment[:, None, :]  # [A, block, W]
        if causal:
            behind = (first + jnp.arange(block))[:, None] - jnp.arange(W)
            seen &= behind >= 0
            if window:
                seen &= behind < window
        logits = jnp.einsum("akgwd,akvd->akgwv", mine, keys, preferred_element_type=jnp.float32)
        logits *= scale
        if softcap:
            logits = softcap * jnp.tanh(logits / softcap)
        logits = jnp.where(seen[:, None, None], logits, MASKED)
        weight = jnp.exp(logits - logits.max(-1, keepdims=True))
        total = weight.sum(-1, keepdims=True)
        mixed = jnp.einsum(
            "akgwv,akvd->akgwd", weight.astype(v.dtype), values, preferred_element_type=jnp.float32
        )
        return mixed / total

    if block == W:
        y = some(0)
    else:
        parts = jax.lax.map(some, jnp.arange(0, W, block))  # [W / block, A, K, G, block, D]
        y = jnp.moveaxis(parts, 0, 3).reshape(A, K, G, W, D)
    return y.transpose(0, 3, 1, 2, 4).reshape(N, H, D).astype(q.dtype)
