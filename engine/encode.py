"""`encode`: texts in, one vector each out. A pure function with no state, and its programs.

    vector i32[.] -> ids, positions, segments, types -> forward -> pool -> f32[texts, E]

The hidden states of a text become one vector as its model was trained: those of the first or the
last token, their mean or their maximum. A classifier gives its labels' numbers instead.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from octavo.backends.record import Backend
from octavo.engine.assemble import Progress
from octavo.engine.compiles import WATCH
from octavo.engine.packing import SEGMENTS, Shape
from octavo.models.ops import AttentionSpec, Ops
from octavo.models.registry import Model
from octavo.pallas_kernels.attention import packed


@dataclass(frozen=True)
class Reading:
    """What is fixed about reading texts with one model."""

    model: Model
    backend: Backend
    mode: str  # cls | mean | max | last

    @property
    def size(self) -> int:
        """Numbers in one vector: E, or the labels of a classifier."""
        return self.model.config.labels or self.model.config.E


def encode(reading: Reading, shape: Shape, params: Any, vector: jax.Array) -> jax.Array:
    """vector i32[shape.packed] (packing.pack) -> f32[shape.texts, reading.size], not normalized."""
    model = reading.model
    per_token = vector[: SEGMENTS * shape.tokens].reshape(SEGMENTS, shape.tokens)
    ids, positions, segments, types = per_token
    first, last = vector[SEGMENTS * shape.tokens :].reshape(2, shape.texts)
    rows = segments.reshape(shape.rows, shape.width)

    def attend(
        q: jax.Array, k: jax.Array, v: jax.Array, cache: Any, call: AttentionSpec
    ) -> tuple[jax.Array, Any]:
        y = packed.attend(
            *(q, k, v, rows),
            causal=call.causal,
            window=call.layer.window,
            scale=call.scale,
            softcap=call.softcap,
        )
        return y, cache

    backend = reading.backend
    ops = Ops(attend, backend.linear, backend.grouped_linear, backend.layers)
    nothing = (None,) * len(model.layer_specs)  # a layer's cache
    more = {"types": types} if model.config.token_types else {}
    hidden, _ = model.forward(params, ids, positions, nothing, ops, **more)
    if model.config.labels:
        at = first if model.config.token_types else last
        return model.logits(params, hidden[at], ops)
    return pool(reading.mode, hidden, segments, first, last)


def pool(
    mode: str, hidden: jax.Array, segments: jax.Array, first: jax.Array, last: jax.Array
) -> jax.Array:
    """hidden [N, E], segments i32[N], first and last i32[texts] -> f32[texts, E].

    What stands for a text that is not there is finite and means nothing.
    """
    if mode in ("cls", "last"):
        return hidden[first if mode == "cls" else last].astype(jnp.float32)
    wide, texts = hidden.astype(jnp.float32), first.shape[0]
    if mode == "max":
        return jax.ops.segment_max(wide, segments, texts + 1)[1:]
    mine = segments == jnp.arange(1, texts + 1)[:, None]  # [texts, N]
    total = jnp.dot(mine.astype(jnp.float32), wide, precision=jax.lax.Precision.HIGHEST)
    return total / (last - first + 1)[:, None]


@dataclass
class EncodePrograms:
    """One compiled program a shape."""

    reading: Reading
    by_shape: dict[Shape, Any] = field(default_factory=dict)

    def compile(
        self, params: Any, shapes: tuple[Shape, ...], progress: Progress | None = None
    ) -> None:
        """Compile every shape, in parallel. params: arrays or ShapeDtypeStructs."""
        abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), params)
        with WATCH.building(), ThreadPoolExecutor(os.cpu_count() or 1) as threads:
            futures = {}
            for shape in sorted(shapes, key=lambda s: s.tokens, reverse=True):
                vector = jax.ShapeDtypeStruct((shape.packed,), jnp.int32)
                lowered = jax.jit(self._function(shape)).lower(abstract, vector)
                options: Any = dict(self.reading.backend.compiler_options(shape.tokens)) or None
                futures[shape] = threads.submit(lowered.compile, compiler_options=options)
            for done, (shape, work) in enumerate(futures.items(), 1):
                self.by_shape[shape] = work.result()
                if progress is not None:
                    progress(f"{shape.rows} x {shape.width} tokens", done, len(futures))

    def _function(self, shape: Shape) -> Any:
        def encode_texts(params: Any, vector: jax.Array) -> jax.Array:
            return encode(self.reading, shape, params, vector)

        return encode_texts

    def workspace(self) -> int:
        """The most temporary memory any program needs, in bytes."""
        sizes = [program.memory_analysis() for program in self.by_shape.values()]
        return max((s.temp_size_in_bytes for s in sizes if s is not None), default=0)
