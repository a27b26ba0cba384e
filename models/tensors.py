"""Checkpoint names are data: a Tensor says a parameter's shape and where it comes from.

A family writes its parameter tree with Tensors as leaves. That one tree drives loading, random
weights, abstract shapes and, by its axes, sharding.

Axes are words of letters, one word per dimension: "E K J D" is four dimensions, "HD E" two. A digit
is itself. The letters (ModelConfig.sizes): V E H K D F X as everywhere, f the width of one expert,
G = H/K query heads per key-value head, J = G + 2: a key-value head's queries, its key, its value.
A leading L is a stack of layers (Model.sizes), whose pieces begin with the layer in `into`.
Of encoders and classifiers: P positions, Y token types, C labels, e a second E.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from octavo.models.config import ModelConfig
from octavo.models.ops import Linear

Index = tuple[int | slice, ...]
ALL = slice(None)


@dataclass(frozen=True)
class Piece:
    """One checkpoint tensor, or a run of its rows, and the part of our parameter that it fills."""

    name: str  # Hugging Face name
    axes: str  # of the piece as stored
    into: Index = ()  # part of the parameter; () is all of it
    whole: str = ""  # axes of the stored tensor, where the piece is only some of its rows
    after: str = ""  # axes of the rows before the piece, word by word
    default: float | None = None  # where the checkpoint lacks it; one number then stands for all


@dataclass(frozen=True)
class Tensor:
    """One parameter: how it is laid out here and which pieces make it."""

    axes: str
    pieces: tuple[Piece, ...]
    init: str = "normal"  # random weights: normal, ones or zeros; ranks: no weight at all
    # How the array is kept, on each shard by itself: the last `flat` words as one dimension, and a
    # matrix [in, out] in blocks of so many columns, [out / columns, in, columns].
    flat: int = 0
    columns: int = 0

    kind: str = ""  # a dtype of its own, whatever the others have

    @property
    def dtype(self) -> Any:
        """The dtype that it has whatever weights have; None: theirs."""
        kind = "int32" if self.init == "ranks" else self.kind
        return np.dtype(kind) if kind else None


def flatten(t: Tensor, keep: int) -> Tensor:
    """The same with all words but the first `keep` as one dimension."""
    return replace(t, flat=max(0, len(t.axes.split()) - keep))


def kept_shape(t: Tensor, dims: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in which an array is kept whose words have the lengths `dims`."""
    if t.flat:
        dims = (*dims[: -t.flat], math.prod(dims[-t.flat :]))
    if not t.columns:
        return dims
    *first, rows, columns = dims
    return (*first, columns // t.columns, rows, t.columns)


def kept(t: Tensor, array: np.ndarray) -> np.ndarray:
    """An array with a dimension for every word, as it is kept."""
    dims = kept_shape(replace(t, columns=0), array.shape)
    array = array.reshape(dims)
    if not t.columns:
        return array
    return array.reshape(*dims[:-1], -1, t.columns).swapaxes(-3, -2)


def array_shape(t: Tensor, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of the parameter as models see it."""
    return kept_shape(t, shape(t.axes, sizes))


def stack(layers: Sequence[Tensor]) -> Tensor:
    """The same parameter of several layers, as one."""
    pieces = (
        replace(piece, into=(i, *piece.into)) for i, t in enumerate(layers) for piece in t.pieces
    )
    return replace(layers[0], axes=f"L {layers[0].axes}", pieces=tuple(pieces))


def unstack(t: Tensor) -> tuple[Tensor, ...]:
    """What `stack` was made of; a parameter of no stack is itself."""
    if not t.axes.startswith("L "):
        return (t,)
    layers: dict[int | slice, list[Piece]] = {}
    for piece in t.pieces:
        layers.setdefault(piece.into[0], []).append(replace(piece, into=piece.into[1:]))
    return tuple(replace(t, axes=t.axes[2:], pieces=tuple(p)) for p in layers.values())


def size(word: str, sizes: Mapping[str, int]) -> int:
    """The length of one dimension."""
    return math.prod(int(c) if c.isdigit() else sizes[c] for c in word)


def shape(axes: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(size(word, sizes) for word in axes.split())


def _letters(axes: str) -> list[str]:
    return list(axes.replace(" ", ""))


def fill(
    out: np.ndarray,
    tensor: Tensor,
    piece: Piece,
    stored: np.ndarray,
    sizes: Mapping[str, int],
    read: Mapping[str, int] | None = None,
) -> None:
    """Write one stored tensor into its part of the parameter `out`, transposed and cast.

    `read` are the sizes of the checkpoint, where they are not those of `out` (shards.py): key-value
    heads are repeated as often as it takes, and rows beyond the vocabulary stay as they are.
    """
    read = sizes if read is None else read
    if piece.whole:
        start = sum(size(word, read) for word in piece.after.split())
        stored = stored[start : start + size(piece.axes.split()[0], read)]
    have = _letters(piece.axes)
    if sizes["K"] != read["K"] and "K" in have and "G" not in have:
        stored = stored.reshape([size(c, read) for c in have])
        stored = np.repeat(stored, sizes["K"] // read["K"], have.index("K"))
    if tensor.axes.startswith("V"):
        out = out[: read["V"]]
    sizes = {**sizes, "V": read["V"]}
    # A slice of J is a key-value head's queries: there, and only there, J is G.
    want = ["G" if c == "J" else c for c in _letters(tensor.axes)]
    order = [have.index(c) for c in want if c in have]
    source = stored.reshape([size(c, sizes) for c in have]).transpose(order)
    _copy(out.reshape([size(c, sizes) for c in _letters(tensor.axes)])[piece.into], source)


def _copy(out: np.ndarray, source: np.ndarray, block: int = 64) -> None:
    """out[...] = source. A transposed source is copied in squares, which stay in the cache: 3x."""
    if source.ndim < 2 or source.flags.c_contiguous:
        out[...] = source
    elif source.ndim > 2:
        for i in range(source.shape[1]):
            _copy(out[:, i], source[:, i], block)
    else:
        for i in range(0, source.shape[0], block):
            for j in range(0, source.shape[1], block):
                square = slice(i, i + block), slice(j, j + block)
                out[square] = source[square]


def tensor(axes: str, *pieces: Piece | str, init: str = "normal") -> Any:
    """A leaf; a bare name is a checkpoint tensor with our axes. (Any: it stands for an array.)"""
    made = tuple(Piece(p, axes) if isinstance(p, str) else p for p in pieces)
    return Tensor(axes, made, init)


def rows(axes: str, *names: str, init: str) -> Any:
    """Several small checkpoint tensors as rows of one parameter: programs have fewer arguments."""
    pieces = (Piece(name, axes, (i,)) for i, name in enumerate(names))
    return tensor(f"{len(names)} {axes}", *pieces, init=init)


def kv_scales(at: str) -> Any:
    """What an 8-bit cache's keys and values were divided by, one number a layer or one a head."""
    names = (f"{at}k_scale", f"{at}v_scale")
    pieces = tuple(Piece(name, "K", (i,), default=1.0) for i, name in enumerate(names))
    return Tensor("2 K", pieces, "ones", kind="float32")


def qkv(config: ModelConfig, at: str) -> Linear:
    """Query, key and value as one projection, grouped by key-value head: [E, K, J, D]."""
    parts = (("q_proj", "KGD", slice(0, -2)), ("k_proj", "KD", -2), ("v_proj", "KD", -1))
    weight = [Piece(f"{at}{n}.weight", f"{rows} E", (ALL, ALL, j)) for n, rows, j in parts]
    bias = [Piece(f"{at}{n}.bias", rows, (ALL, j)) for n, rows, j in parts]
    return Linear(
        weight=tensor("E K J D", *weight),
        bias=tensor("K J D", *bias, init="zeros") if config.qkv_bias else None,
    )


def linear(axes: str, name: str, bias: bool = False) -> Linear:
    """One projection [in, out], stored as [out, in]."""
    rows, columns = axes.split()
    return Linear(
        weight=tensor(axes, Piece(f"{name}.weight", f"{columns} {rows}")),
        bias=tensor(columns, f"{name}.bias", init="zeros") if bias else None,
    )


def gate_up(config: ModelConfig, at: str) -> Linear:
    """Gate and up as one projection: [E, 2, F]."""
    names = ("gate_proj", "up_proj")
    weight = [Piece(f"{at}{n}.weight", "F E", (ALL, i)) for i, n in enumerate(names)]
    bias = [Piece(f"{at}{n}.bias", "F", (i,)) for i, n in enumerate(names)]
    return Linear(
        weight=tensor("E 2 F", *weight),
        bias=tensor("2 F", *bias, init="zeros") if config.mlp_bias else None,
    )
