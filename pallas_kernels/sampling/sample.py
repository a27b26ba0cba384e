"""From logits to tokens: one argmax where every row is greedy, one noisy argmax where not.

    edited = edit(logits)                                penalties.py
    scaled = edited / temperature
    token  = argmax(scaled + gumbel  where scaled >= threshold)    thresholds.py, noise.py

The largest of logits plus Gumbel noise is a draw from their softmax.
"""

import jax
import jax.numpy as jnp

from octavo.pallas_kernels.sampling.controls import GREEDY_BELOW, Controls
from octavo.pallas_kernels.sampling.noise import gumbel
from octavo.pallas_kernels.sampling.penalties import Edits, edit
from octavo.pallas_kernels.sampling.thresholds import LEAST, LOWEST, threshold


def sample(
    logits: jax.Array,
    controls: Controls,
    seed: jax.Array,
    position: jax.Array,
    edits: Edits | None = None,
    *,
    logprobs: bool = False,
    branches: bool = True,
) -> tuple[jax.Array, jax.Array]:
    """Tokens i32[R] and their log probabilities f32[R] under the logits as they came.

    logits f32[R, V], seed u32[R, 2], position i32[R] (of the token to be drawn, in its sequence).
    Without `logprobs` the log probabilities are zeros and cost nothing. Without `branches` the
    program has no conditional, no loop and no infinity, for compilers that have none of these.
    """
    edited = logits if edits is None else edit(logits, controls, edits, branches=branches)
    if branches:
        tokens = jax.lax.cond(
            jnp.all(controls.temperature < GREEDY_BELOW),
            lambda: argmax(edited),
            lambda: draw(edited, controls, seed, position),
        )
    else:
        tokens = draw(edited, controls, seed, position, branches=False)
    if not logprobs:
        return tokens, jnp.zeros(tokens.shape, jnp.float32)
    return tokens, _log_probability(logits, tokens)


def draw(
    logits: jax.Array,
    controls: Controls,
    seed: jax.Array,
    position: jax.Array,
    *,
    branches: bool = True,
) -> jax.Array:
    """Tokens i32[R], of greedy rows too."""
    V = logits.shape[1]
    greedy = controls.temperature < GREEDY_BELOW
    scaled = logits / jnp.where(greedy, 1.0, controls.temperature)[:, None]
    # A greedy row has nothing to search for.
    top_k, top_p = jnp.where(greedy, 0, controls.top_k), jnp.where(greedy, 1.0, controls.top_p)
    kept = threshold(scaled, top_k, top_p, controls.min_p, branches=branches)
    noise = gumbel(seed, controls.choice, position, jnp.arange(V, dtype=jnp.int32))
    lowest = LOWEST if branches else LEAST
    noisy = jnp.where(scaled >= kept[:, None], scaled + noise, lowest)
    return argmax(jnp.where(greedy[:, None], logits, noisy))


def top_logprobs(
    logits: jax.Array, tokens: jax.Array, k: int, *, branches: bool = True
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The k likeliest and the chosen one, under log_softmax of logits f32[R, V].

    ids i32[R, k], logprobs f32[R, k], chosen f32[R] of tokens i32[R], rank i32[R] (1 is the
    likeliest; equals share the better rank). k is static and may be 0.
    """
    total = log_total(logits)
    values, ids = jax.lax.top_k(logits, k) if branches else largest(logits, k)
    chosen = _at(logits, tokens)
    rank = 1 + jnp.sum(logits > chosen[:, None], -1, dtype=jnp.int32)
    return ids.astype(jnp.int32), values - total[:, None], chosen - total, rank


def named_logprobs(logits: jax.Array, ids: jax.Array) -> jax.Array:
    """f32[R, M] log_softmax of logits f32[R, V] at ids i32[R, M]."""
    return _pick(logits, ids) - log_total(logits)[:, None]


def largest(x: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The k largest of each row of x f32[R, V] and where they are i32[R, k], one after another."""
    places = jnp.arange(x.shape[1], dtype=jnp.int32)
    values, ids = [], []
    for _ in range(k):
        id = argmax(x)
        values.append(x.max(-1))
        ids.append(id)
        x = jnp.where(places == id[:, None], LEAST, x)
    if not k:
        return x[:, :0], jnp.zeros((x.shape[0], 0), jnp.int32)
    return jnp.stack(values, axis=1), jnp.stack(ids, axis=1)


def log_total(logits: jax.Array) -> jax.Array:
    """f32[R] the logarithm of the sum of exp(logits f32[R, V])."""
    top = logits.max(-1)
    return top + jnp.log(jnp.sum(jnp.exp(logits - top[:, None]), -1))


def argmax(x: jax.Array) -> jax.Array:
    """i32[R], the first of equals. Two plain reductions: on CPU jnp.argmax is ten times slower."""
    V = x.shape[1]
    places = jnp.where(x == x.max(-1, keepdims=True), jnp.arange(V, dtype=jnp.int32), V - 1)
    return places.min(-1)


def _at(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    return _pick(logits, tokens[:, None])[:, 0]


def _pick(logits: jax.Array, ids: jax.Array) -> jax.Array:
    """f32[R, n] of logits f32[R, V] at ids i32[R, n], clipped into the vocabulary."""
    R, V = logits.shape
    rows = jnp.arange(R, dtype=jnp.int32)[:, None]
    at = (rows * V + jnp.clip(ids, 0, V - 1)).reshape(-1)
    flat = logits.reshape(-1)
    picked = flat.at[at].get(mode="promise_in_bounds", wrap_negative_indices=False)
    return picked.reshape(ids.shape)


def _log_probability(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    return _at(logits, tokens) - log_total(logits)
