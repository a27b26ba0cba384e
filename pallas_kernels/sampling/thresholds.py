"""Top-k, top-p and min-p as one number per row: the smallest logit that stays.

    min-p   exp(x - max x) >= min_p
    top-k   at most k - 1 logits are larger than x
    top-p   the probabilities of the logits larger than x sum to less than p, where probabilities
            are those of what min-p and top-k left

Each keeps a set {x >= t}, so equal logits stay or go together: top-k may keep more than k where the
k-th largest has equals. t is found by bisection, never by a sort. Bisection is on an integer with
the order of the floats (a float's bits, with the negative half reversed), so it ends after 32
passes with the exact t; it ends earlier when at most one logit is left to decide about.

    -inf                              t                         max
      |--------------------|----------x-------|------------------|
      lo: keeps enough                        hi: keeps too few
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from octavo.pallas_kernels.sampling.across import Across, largest, total

LOWEST = -jnp.inf
LEAST = -3e38  # in its place for those without infinities
PASSES = 32  # that find one number of 32 bits

# lo, hi, how many logits are >= each, and which rows are done
_Bracket = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]


def threshold(
    logits: jax.Array,
    top_k: jax.Array,
    top_p: jax.Array,
    min_p: jax.Array,
    across: Across | None = None,
    *,
    branches: bool = True,
) -> jax.Array:
    """f32[R]: row r keeps logits[r] >= threshold[r]; -inf where all controls of a row are off.

    logits f32[R, V] are scaled by the temperature already; -inf marks what is forbidden.
    Without `branches` all passes are made, one behind another, and LEAST stands for -inf.
    """
    lowest = LOWEST if branches else LEAST
    top = largest(across, logits.max(-1))
    kept = jnp.where(min_p > 0, top + jnp.log(jnp.maximum(min_p, 1e-38)), lowest)
    kept = jnp.maximum(kept, top_k_threshold(logits, top_k, top, across, branches=branches))
    # Rounding must not lose the largest: with min_p = 1 it is all that stays.
    kept = jnp.minimum(kept, top)
    if not branches:
        return top_p_threshold(logits, top_p, top, kept, across, branches=False)
    return jax.lax.cond(
        jnp.any(top_p < 1), lambda: top_p_threshold(logits, top_p, top, kept, across), lambda: kept
    )


def top_k_threshold(
    logits: jax.Array,
    top_k: jax.Array,
    top: jax.Array,
    across: Across | None = None,
    *,
    branches: bool = True,
) -> jax.Array:
    """The k-th largest logit f32[R]; -inf where top_k i32[R] is below 1 or takes in all."""
    V = logits.shape[1] * (1 if across is None else across.count)

    def measure(at: jax.Array) -> tuple[jax.Array, jax.Array]:
        count = total(across, jnp.sum(logits >= at[:, None], -1, dtype=jnp.int32))
        return count, count

    off = (top_k < 1) | (top_k >= V)
    everything = jnp.full_like(top, LOWEST if branches else LEAST)
    bracket = (everything, top, jnp.full_like(top_k, V), off)
    return _bisect(measure, top_k, *bracket, branches=branches)


def top_p_threshold(
    logits: jax.Array,
    top_p: jax.Array,
    top: jax.Array,
    kept: jax.Array,
    across: Across | None = None,
    *,
    branches: bool = True,
) -> jax.Array:
    """The smallest logit f32[R] that top-p keeps among those of at least `kept` f32[R]."""
    weight = jnp.exp(logits - top[:, None])

    def measure(at: jax.Array) -> tuple[jax.Array, jax.Array]:
        stays = logits >= at[:, None]
        mass = jnp.sum(jnp.where(stays, weight, 0.0), -1)
        return total(across, mass), total(across, jnp.sum(stays, -1, dtype=jnp.int32))

    mass, count = measure(kept)
    return _bisect(measure, top_p * mass, kept, top, count, top_p >= 1, branches=branches)


def _bisect(
    measure: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
    enough: jax.Array,
    lowest: jax.Array,
    highest: jax.Array,
    count: jax.Array,
    done: jax.Array,
    *,
    branches: bool,
) -> jax.Array:
    """The largest t f32[R] in [lowest, highest] whose measure is `enough`, up to logits it keeps.

    measure(t f32[R]) -> (value [R] that falls as t rises, how many logits are >= t i32[R]); `count`
    belongs to `lowest`, which is known to keep enough and is the answer where `done` bool[R].
    """

    def open_rows(state: _Bracket) -> jax.Array:
        return ~jnp.all(state[4])

    def halve(state: _Bracket) -> _Bracket:
        lo, hi, at_lo, at_hi, done = state
        middle = (lo & hi) + ((lo ^ hi) >> 1)  # the mean without overflow, rounded down
        value, count = measure(_float(middle))
        up = (value >= enough) & ~done
        down = (value < enough) & ~done
        lo, at_lo = jnp.where(up, middle, lo), jnp.where(up, count, at_lo)
        hi, at_hi = jnp.where(down, middle, hi), jnp.where(down, count, at_hi)
        # Between lo and hi lies the logit that decides; alone, it stays with lo.
        return lo, hi, at_lo, at_hi, done | (at_lo - at_hi <= 1) | (hi - lo == 1)

    lo, hi = _order(lowest), _order(highest) + 1
    done = done | (hi - lo == 1)
    state = (lo, hi, count, jnp.zeros_like(count), done)
    if branches:
        return _float(jax.lax.while_loop(open_rows, halve, state)[0])
    for _ in range(PASSES):
        state = halve(state)
    return _float(state[0])


def _order(x: jax.Array) -> jax.Array:
    """i32 with the order of f32; both zeros are one number."""
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _float(order: jax.Array) -> jax.Array:
    """The f32 of a number made by `_order`."""
    return jax.lax.bitcast_convert_type(order ^ ((order >> 31) & 0x7FFFFFFF), jnp.float32)
