"""From logits to tokens: one argmax where every row is greedy, one noisy argmax where not.

    edited = edit(logits)                                penalties.py
    scaled = edited / temperature
    token  = argmax(scaled + gumbel  where scaled >= threshold)    thresholds.py, noise.py

The largest of logits plus Gumbel noise is a draw from their softmax.
"""

import jax
import jax.numpy as jnp

from octavo.pallas_kernels.sampling.across import (
    Across,
    ids_of,
    largest,
    log_sum_exp,
    total,
    values_at,
)
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
    across: Across | None = None,
    branches: bool = True,
) -> tuple[jax.Array, jax.Array]:
    """Tokens i32[R] and their log probabilities f32[R] under the logits as they came.

    logits f32[R, V], seed u32[R, 2], position i32[R] (of the token to be drawn, in its sequence).
    Without `logprobs` the log probabilities are zeros and cost nothing. `across`: the logits are
    one shard's part; tokens are the same on every shard. Without `branches` the program has no
    conditional, no loop and no infinity, for compilers that have none of these.
    """
    edited = logits if edits is None else edit(logits, controls, edits, across, branches=branches)
    if branches:
        tokens = jax.lax.cond(
            jnp.all(controls.temperature < GREEDY_BELOW),
            lambda: argmax(edited, across),
            lambda: draw(edited, controls, seed, position, across),
        )
    else:
        tokens = draw(edited, controls, seed, position, across, branches=False)
    if not logprobs:
        return tokens, jnp.zeros(tokens.shape, jnp.float32)
    return tokens, _at(logits, tokens, across) - log_sum_exp(across, logits)


def draw(
    logits: jax.Array,
    controls: Controls,
    seed: jax.Array,
    position: jax.Array,
    across: Across | None = None,
    *,
    branches: bool = True,
) -> jax.Array:
    """Tokens i32[R], of greedy rows too."""
    V = logits.shape[1]
    greedy = controls.temperature < GREEDY_BELOW
    scaled = logits / jnp.where(greedy, 1.0, controls.temperature)[:, None]
    # A greedy row has nothing to search for.
    top_k, top_p = jnp.where(greedy, 0, controls.top_k), jnp.where(greedy, 1.0, controls.top_p)
    kept = threshold(scaled, top_k, top_p, controls.min_p, across, branches=branches)
    noise = gumbel(seed, controls.choice, position, ids_of(across, V))
    lowest = LOWEST if branches else LEAST
    noisy = jnp.where(scaled >= kept[:, None], scaled + noise, lowest)
    return argmax(jnp.where(greedy[:, None], logits, noisy), across)


def top_logprobs(
    logits: jax.Array,
    tokens: jax.Array,
    k: int,
    across: Across | None = None,
    *,
    branches: bool = True,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The k likeliest and the chosen one, under log_softmax of logits f32[R, V].

    ids i32[R, k], logprobs f32[R, k], chosen f32[R] of tokens i32[R], rank i32[R] (1 is the
    likeliest; equals share the better rank). k is static and may be 0.
    """
    mass = log_sum_exp(across, logits)
    values, ids = _top(logits, k, across) if branches else _top_by_turns(logits, k, across)
    chosen = _at(logits, tokens, across)
    above = jnp.sum(logits > chosen[:, None], -1, dtype=jnp.int32)
    return ids, values - mass[:, None], chosen - mass, 1 + total(across, above)


def _top(logits: jax.Array, k: int, across: Across | None) -> tuple[jax.Array, jax.Array]:
    """The k largest f32[R, k] and their ids i32[R, k]: of those that each shard found, the best."""
    if across is None:
        values, ids = jax.lax.top_k(logits, k)
        return values, ids.astype(jnp.int32)
    R, V = logits.shape
    values, ids = jax.lax.top_k(logits, min(k, V))
    every, of = across.all(values), across.all(ids.astype(jnp.int32) + across.rank * V)
    every, of = (jnp.moveaxis(a, 0, 1).reshape(R, -1) for a in (every, of))
    values, at = jax.lax.top_k(every, k)  # equals stay in the order of their ids
    return values, jnp.take_along_axis(of, at, axis=1)


def _top_by_turns(logits: jax.Array, k: int, across: Across | None) -> tuple[jax.Array, jax.Array]:
    """The same by k maxima, for compilers without top-k."""
    R, V = logits.shape
    ids = jnp.broadcast_to(ids_of(across, V), (R, V))
    values, ids = _by_turns(logits, ids, min(k, V))
    if across is None:
        return values, ids
    every, of = across.all(values), across.all(ids)  # [n, R, k]
    every, of = (jnp.moveaxis(a, 0, 1).reshape(R, -1) for a in (every, of))
    return _by_turns(every, of, k)


def _by_turns(values: jax.Array, ids: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The k largest values f32[R, k] of f32[R, n] with their ids i32[R, n], the lower id first."""
    best, of = [values[:, :0]], [ids[:, :0]]
    for _ in range(k):
        top = values.max(-1, keepdims=True)
        id = jnp.where(values == top, ids, jnp.iinfo(jnp.int32).max).min(-1, keepdims=True)
        best.append(top)
        of.append(id)
        values = jnp.where(ids == id, LEAST, values)
    return jnp.concatenate(best, axis=1), jnp.concatenate(of, axis=1)


def named_logprobs(logits: jax.Array, ids: jax.Array, across: Across | None = None) -> jax.Array:
    """f32[R, M] log_softmax of logits f32[R, V] at ids i32[R, M]."""
    return values_at(across, logits, ids) - log_sum_exp(across, logits)[:, None]


def argmax(x: jax.Array, across: Across | None = None) -> jax.Array:
    """i32[R], the first of equals. Two plain reductions: on CPU jnp.argmax is ten times slower."""
    V = x.shape[1]
    last = V * (1 if across is None else across.count) - 1
    top = largest(across, x.max(-1))
    places = jnp.where(x == top[:, None], ids_of(across, V), last).min(-1)
    return places if across is None else across.smallest(places)


def _at(logits: jax.Array, tokens: jax.Array, across: Across | None) -> jax.Array:
    return values_at(across, logits, tokens[:, None])[:, 0]
