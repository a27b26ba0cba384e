"""Rotary position embedding: inverse frequencies, scaled once for the longest sequence served.

    angle[n, i] = position[n] * inv_freq[i]        i < D' / 2, D' the part of the head that turns

Two scalings depend on the length of the sequence (dynamic, longrope). Keys in the cache are turned
already, so the choice cannot change while a sequence grows: `max_model_len` decides it, at build.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from octavo.models.config import ModelConfigError, RopeConfig


@dataclass(frozen=True, eq=False)
class Rope:
    """inv_freq f32[D'/2], and the factor on cos and sin."""

    inv_freq: np.ndarray
    scale: float


def make_rope(rope: RopeConfig, head_dim: int, max_len: int, max_model_len: int) -> Rope:
    """Scale for sequences of up to `max_model_len`; `max_len` is max_position_embeddings."""
    dim = int(head_dim * rope.partial)
    theta = rope.theta
    if rope.kind == "dynamic":
        length = max(max_model_len, max_len)
        stretch = rope.factor * length / max_len - (rope.factor - 1)
        theta *= stretch ** (dim / (dim - 2))
    exponent = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    wave = np.float32(theta) ** exponent  # radians per position are 1 / wave
    if rope.kind == "linear":
        return Rope(1 / wave / np.float32(rope.factor), 1.0)
    if rope.kind == "llama3":
        return Rope(_llama3(rope, 1 / wave), 1.0)
    if rope.kind == "yarn":
        return Rope(_yarn(rope, wave, dim), _yarn_scale(rope))
    if rope.kind == "longrope":
        return _longrope(rope, wave, max_model_len)
    return Rope(1 / wave, 1.0)


def _llama3(rope: RopeConfig, inv_freq: np.ndarray) -> np.ndarray:
    """Divide the slow frequencies, keep the fast ones, blend between."""
    wavelength = 2 * math.pi / inv_freq
    longest = rope.original_len / rope.low_freq_factor
    shortest = rope.original_len / rope.high_freq_factor
    blend = rope.original_len / wavelength - rope.low_freq_factor
    blend = blend / (rope.high_freq_factor - rope.low_freq_factor)
    slow = inv_freq / rope.factor
    mixed = (1 - blend) * slow + blend * inv_freq
    out = np.where(wavelength > longest, slow, np.where(wavelength < shortest, inv_freq, mixed))
    return out.astype(np.float32)


def _yarn(rope: RopeConfig, wave: np.ndarray, dim: int) -> np.ndarray:
    """Divide the frequencies that turn less than beta_slow times in the original length, keep those
    that turn more than beta_fast times, ramp between."""

    def index(turns: float) -> float:
        ratio = rope.original_len / (turns * 2 * math.pi)
        return dim * math.log(ratio) / (2 * math.log(rope.theta))

    low, high = index(rope.beta_fast), index(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - low) / (high - low), 0, 1)
    return ((1 / (rope.factor * wave)) * ramp + (1 / wave) * (1 - ramp)).astype(np.float32)


def _yarn_scale(rope: RopeConfig) -> float:
    if rope.attention_factor is not None:
        return float(rope.attention_factor)

    def scale(weight: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * weight * math.log(rope.factor) + 1.0

    if rope.mscale and rope.mscale_all_dim:
        return scale(rope.mscale) / scale(rope.mscale_all_dim)
    return scale(1.0)


def _longrope(rope: RopeConfig, wave: np.ndarray, max_model_len: int) -> Rope:
    factors = rope.long_factor if max_model_len > rope.original_len else rope.short_factor
    if len(factors) != len(wave):
        raise ModelConfigError(
            f"rope scaling 'longrope' has {len(factors)} factors, but {len(wave)} frequencies"
        )
    scale = rope.attention_factor
    if scale is None:
        stretch = math.log(rope.factor) / math.log(rope.original_len) if rope.factor > 1 else 0.0
        scale = math.sqrt(1 + stretch)
    return Rope(1 / (np.asarray(factors, np.float32) * wave), float(scale))


def rotation(rope: Rope, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """positions i32[N] -> cos, sin, each f32[N, 1, D'/2]; once per step, for all layers."""
    angle = positions[:, None, None].astype(jnp.float32) * rope.inv_freq
    return jnp.cos(angle) * rope.scale, jnp.sin(angle) * rope.scale


def rotate(x: jax.Array, turn: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turn x [N, heads, D]: pairs are (i, i + D'/2); what lies past D' stays. In float32."""
    cos, sin = turn
    half = cos.shape[-1]
    a, b = x[..., :half].astype(jnp.float32), x[..., half : 2 * half].astype(jnp.float32)
    turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
    if 2 * half == x.shape[-1]:
        return turned
    return jnp.concatenate([turned, x[..., 2 * half :]], axis=-1)
