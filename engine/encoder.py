"""Embeddings from a decoder: a pure function of tokens, with its own buckets and no page state."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from octavo.engine.compiles import WATCH
from octavo.models.plain_ops import empty_cache, plain_ops
from octavo.models.registry import Model

BUCKETS = (32, 128, 512, 2048, 8192, 32768, 131072)


class Encoder:
    """Runs whole prompts, one at a time. A bucket is compiled when a prompt first needs it."""

    def __init__(self, model: Model, params: Any, dtype: Any) -> None:
        self._model, self._params, self._dtype = model, params, dtype
        self._programs: dict[int, Any] = {}

    def __call__(
        self, prompts: Sequence[Sequence[int]], *, pooling: str = "last", normalize: bool = True
    ) -> np.ndarray:
        """f32[n, E]. Raises ValueError for an empty or too long prompt, or an unknown pooling."""
        if pooling not in ("last", "mean"):
            raise ValueError(f"`pooling` must be last or mean, got {pooling}")
        rows = []
        for ids in prompts:
            count = len(ids)
            if not 0 < count <= self._model.max_model_len:
                raise ValueError(
                    f"a prompt to encode needs 1 to {self._model.max_model_len:,} tokens, "
                    f"got {count}"
                )
            hidden = self._hidden(np.asarray(ids, np.int32))[:count]
            row = hidden[-1] if pooling == "last" else hidden.mean(axis=0)
            rows.append(row / max(float(np.linalg.norm(row)), 1e-12) if normalize else row)
        return np.stack(rows)

    def _hidden(self, ids: np.ndarray) -> np.ndarray:
        bucket = next(b for b in BUCKETS if b >= len(ids))
        padded = np.zeros(bucket, np.int32)
        padded[: len(ids)] = ids
        if bucket not in self._programs:
            with WATCH.building():  # offline use: nobody's stream waits for it
                tokens = jax.ShapeDtypeStruct((bucket,), jnp.int32)
                self._programs[bucket] = (
                    jax.jit(self._forward).lower(self._params, tokens).compile()
                )
        return np.asarray(self._programs[bucket](self._params, padded), np.float32)

    def _forward(self, params: Any, tokens: jax.Array) -> jax.Array:
        positions = jnp.arange(tokens.shape[0], dtype=jnp.int32)
        cache = empty_cache(self._model, tokens.shape[0], self._dtype)
        return self._model.forward(params, tokens, positions, cache, plain_ops(positions))[0]
