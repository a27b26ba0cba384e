"""Controls: what each row asks of sampling, as one small float array between host and device."""

from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

NAMES = (
    "temperature",
    "top_p",
    "min_p",
    "repetition",
    "presence",
    "frequency",
    "top_k",
    "choice",
)
NS = len(NAMES)  # columns of the packed form
OFF = (0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0)  # a greedy row with everything off

GREEDY_BELOW = 1e-5  # temperatures below this are greedy


@flax.struct.dataclass
class Controls:
    """One value per row, R of each."""

    temperature: jax.Array  # f32[R] below GREEDY_BELOW takes the likeliest token
    top_p: jax.Array  # f32[R] in (0, 1]; 1 is off
    min_p: jax.Array  # f32[R] in [0, 1]; 0 is off
    repetition: jax.Array  # f32[R] > 0; 1 is off
    presence: jax.Array  # f32[R] 0 is off
    frequency: jax.Array  # f32[R] 0 is off
    top_k: jax.Array  # i32[R] below 1 is off
    choice: jax.Array  # i32[R] which of a request's n choices this is

    @staticmethod
    def pack(
        temperature: float = 1.0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition: float = 1.0,
        presence: float = 0.0,
        frequency: float = 0.0,
        top_k: int = 0,
        choice: int = 0,
    ) -> np.ndarray:
        """f32[NS] for one row, on the host. Whole numbers are exact up to 2^24."""
        row: Sequence[float] = (
            temperature,
            top_p,
            min_p,
            repetition,
            presence,
            frequency,
            min(max(top_k, 0), 1 << 24),
            choice,
        )
        return np.array(row, np.float32)

    @staticmethod
    def unpack(packed: jax.Array) -> "Controls":
        """f32[R, NS] -> Controls of R rows, on the device."""
        columns = {name: packed[:, i] for i, name in enumerate(NAMES)}
        for whole in ("top_k", "choice"):
            columns[whole] = columns[whole].astype(jnp.int32)
        return Controls(**columns)
