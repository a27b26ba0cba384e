"""The plan: all that the host tells a step, one packed int32 vector.

    stops | moves | returned pages | admissions | shared pages | window advances | uploads | chunks

Every segment has a fixed place, so one program reads any plan. The host fills a `Draft` and packs
it once; a packed vector is never written again (the transfer may alias it). The device side of the
same layout is `unpack`, which gives a `Plan` of arrays.
"""

from dataclasses import dataclass, field

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from octavo.engine.state import BIAS, STOP_IDS, Dims

MOVES = 4  # row moves in one plan
# Fields of one admission before its stop ids, sampling columns and per-group pages.
SCALARS = ("slot", "length", "prompt_len", "limit", "min_tokens", "seed", "seed_high", "adapter")
HISTORY, BIAS_IDS, BIAS_VALUES = range(3)  # kinds of upload


@flax.struct.dataclass
class Plan:
    """A plan as the device sees it."""

    stop: jax.Array  # bool[B]
    move_src: jax.Array  # i32[MOVES]
    move_dst: jax.Array  # i32[MOVES]
    returned: jax.Array  # i32[G, U]
    returned_count: jax.Array  # i32[G]
    admission: jax.Array  # i32[A, SCALARS]; slot -1 is unused
    stop_ids: jax.Array  # i32[A, 8]
    sampling: jax.Array  # f32[A, NS]
    first: jax.Array  # i32[A, G]
    held: jax.Array  # i32[A, G]
    shared: jax.Array  # i32[G, U]
    window_first: jax.Array  # i32[G, B]
    piece: jax.Array  # i32[3 A, 4] slot, offset, count, kind
    upload: jax.Array  # i32[tokens]
    chunk: jax.Array  # i32[C, 4] slot, start, count, final


def _segments(dims: Dims) -> dict[str, tuple[int, ...]]:
    """The shape of each segment, in order."""
    groups, admissions = len(dims.groups), dims.chunks
    return {
        "chunk": (dims.chunks, 4),
        "stop": (-(-dims.slots // 32),),
        "move": (2, MOVES),
        "returned": (groups, dims.returns),
        "returned_count": (groups,),
        "admission": (admissions, len(SCALARS)),
        "stop_ids": (admissions, STOP_IDS),
        "sampling": (admissions, dims.controls),
        "first": (admissions, groups),
        "held": (admissions, groups),
        "shared": (groups, dims.returns),
        "window_first": (groups, dims.slots),
        "piece": (pieces(dims), 4),
        "upload": (upload_capacity(dims),),
    }


def upload_capacity(dims: Dims) -> int:
    """Tokens one plan can carry: any one prompt with all its biases, or several short ones."""
    return max(dims.max_len, dims.max_chunk) + 2 * BIAS


def pieces(dims: Dims) -> int:
    """Upload pieces in one plan: each admission's tokens, the ids of its biases, their values."""
    return 3 * dims.chunks


def plan_size(dims: Dims) -> int:
    """Length of the packed vector."""
    return sum(int(np.prod(shape)) for shape in _segments(dims).values())


def chunk_segment(dims: Dims, vector: jax.Array) -> jax.Array:
    """The chunks alone, i32[C, 4], which is all that a forward pass needs."""
    return vector[: dims.chunks * 4].reshape(dims.chunks, 4)


def unpack(dims: Dims, vector: jax.Array) -> Plan:
    """Split a packed i32 vector into its segments; inside a program."""
    parts: dict[str, jax.Array] = {}
    at = 0
    for name, shape in _segments(dims).items():
        size = int(np.prod(shape))
        parts[name] = vector[at : at + size].reshape(shape)
        at += size
    bits = (parts["stop"][:, None] >> jnp.arange(32, dtype=jnp.int32)[None, :]) & 1
    move, sampling = parts.pop("move"), parts.pop("sampling")
    parts["stop"] = bits.reshape(-1)[: dims.slots] != 0
    return Plan(
        move_src=move[0],
        move_dst=move[1],
        sampling=jax.lax.bitcast_convert_type(sampling, jnp.float32),
        **parts,
    )


@dataclass
class Admission:
    """One slot's beginning."""

    slot: int
    length: int  # tokens found in the prefix cache
    prompt_len: int
    limit: int
    min_tokens: int
    seed: int  # 64 bits
    stop_ids: list[int]
    sampling: np.ndarray  # f32[NS]
    pages: list[tuple[int, np.ndarray]]  # per group: first page index, then the shared page ids
    adapter: int = 0


@dataclass
class Chunk:
    """Prompt tokens of one slot to run in this step."""

    slot: int
    start: int
    count: int
    final: bool  # the last token of the prompt: its hidden state is sampled


@dataclass
class Draft:
    """A plan under construction, on the host."""

    stops: list[int] = field(default_factory=list)
    moves: list[tuple[int, int]] = field(default_factory=list)
    returned: list[list[int]] = field(default_factory=list)  # per group
    admissions: list[Admission] = field(default_factory=list)
    windows: list[tuple[int, int, int]] = field(default_factory=list)  # group, slot, first
    uploads: list[tuple[int, int, int, np.ndarray]] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)

    def edits(self) -> bool:
        """Whether the state must be edited before the forward pass."""
        return bool(
            self.stops
            or self.moves
            or self.admissions
            or self.windows
            or self.uploads
            or any(self.returned)
        )


class Packer:
    """Packs drafts; holds the views' offsets so that a pack is a few array writes."""

    def __init__(self, dims: Dims) -> None:
        self.dims = dims
        self.size = plan_size(dims)
        self.shapes = _segments(dims)

    def _views(self, vector: np.ndarray) -> dict[str, np.ndarray]:
        views, at = {}, 0
        for name, shape in self.shapes.items():
            size = int(np.prod(shape))
            views[name] = vector[at : at + size].reshape(shape)
            at += size
        return views

    def pack(self, draft: Draft) -> np.ndarray:
        """The draft as i32[plan_size]. A fresh array every time: the transfer may alias it."""
        vector = np.zeros(self.size, np.int32)
        view = self._views(vector)
        view["admission"][:, 0] = -1
        for i, chunk in enumerate(draft.chunks):
            view["chunk"][i] = (chunk.slot, chunk.start, chunk.count, chunk.final)
        if not draft.edits():
            return vector
        stops = view["stop"].view(np.uint32)
        for slot in draft.stops:
            stops[slot >> 5] |= np.uint32(1 << (slot & 31))
        for i, move in enumerate(draft.moves):
            view["move"][:, i] = move
        for group, ids in enumerate(draft.returned):
            view["returned"][group, : len(ids)] = ids
            view["returned_count"][group] = len(ids)
        for group, slot, first in draft.windows:
            view["window_first"][group, slot] = first
        self._pack_admissions(view, draft.admissions)
        at = 0
        for i, (kind, slot, offset, values) in enumerate(draft.uploads):
            view["piece"][i] = (slot, offset, len(values), kind)
            view["upload"][at : at + len(values)] = values
            at += len(values)
        return vector

    def _pack_admissions(self, view: dict[str, np.ndarray], admissions: list[Admission]) -> None:
        used = [0] * len(self.dims.groups)
        for i, a in enumerate(admissions):
            low, high = np.array([a.seed & (2**64 - 1)], np.uint64).view(np.int32).tolist()
            view["admission"][i] = (
                a.slot,
                a.length,
                a.prompt_len,
                a.limit,
                a.min_tokens,
                low,
                high,
                a.adapter,
            )
            view["stop_ids"][i] = -1
            view["stop_ids"][i, : len(a.stop_ids)] = a.stop_ids
            view["sampling"][i] = a.sampling.view(np.int32)
            for group, (first, ids) in enumerate(a.pages):
                view["first"][i, group] = first
                view["held"][i, group] = first + len(ids)
                view["shared"][group, used[group] : used[group] + len(ids)] = ids
                used[group] += len(ids)
