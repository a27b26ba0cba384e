"""Weights: from tensors with Hugging Face names to a parameter tree, one parameter at a time.

Never more than one parameter of one layer is in host memory on its way: read, laid out and cast by
numpy, put; where layers are stacked, into its place in the stack.
"""

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from octavo.models.layers import Decoder
from octavo.models.registry import Model
from octavo.models.tensors import Tensor, fill, shape, unstack

Get = Callable[[str], np.ndarray]
Put = Callable[[np.ndarray], jax.Array]
Progress = Callable[[str, int, int], None]  # name, bytes done, bytes in all

# Tensors of some checkpoints that a decoder does not need: buffers, and the parts that see.
HARMLESS_ENDINGS = (
    "rotary_emb.inv_freq",
    "self_attn.masked_bias",
    "self_attn.bias",
    "self_attn.k_scale",  # of a cache of 8 bits, where ours has more
    "self_attn.v_scale",
    "self_attn.q_scale",
    "self_attn.prob_scale",
)
HARMLESS_BEGINNINGS = ("model.vision_tower.", "model.multi_modal_projector.")
# An encoder's: what fills gaps in a text, buffers, and the pooler where no classifier reads it.
BERT_EXTRAS = (
    "cls.",
    "lm_head.",
    "pooler.",
    "embeddings.position_ids",
    "embeddings.token_type_ids",
)


class LoadError(ValueError):
    """Weights that do not fit the model: which, and how."""


def load_params(
    model: Model,
    get: Get,
    names: Iterable[str],
    dtype: Any,
    put: Put = jax.device_put,
    progress: Progress | None = None,
) -> Decoder:
    """Read every parameter of `model` with `get` (by Hugging Face name), as `dtype`.

    Raises LoadError where a name is missing or left over, or a shape differs.
    """
    stored = {canonical_name(name): name for name in names}
    check_names(model, stored)
    sizes = model.sizes
    done, total = 0, param_bytes(model, dtype)

    def read(t: Tensor) -> np.ndarray:
        out = np.empty(shape(t.axes, sizes), t.dtype or dtype)
        for piece in t.pieces:
            want = shape(piece.whole or piece.axes, sizes)
            if piece.default is None:
                array = get(stored[piece.name])
            else:
                found = get(stored[piece.name]) if piece.name in stored else np.array(piece.default)
                array = np.broadcast_to(found.reshape(-1), want) if found.size == 1 else found
                array = array.reshape(want) if array.size == math.prod(want) else array
            if array.shape != want:
                raise LoadError(
                    f"tensor {stored[piece.name]} has shape {list(array.shape)}, but config.json "
                    f"asks for {list(want)}; are the weights those of this config?"
                )
            fill(out, t, piece, array, sizes)
        return out

    def leaf(t: Tensor) -> jax.Array:
        nonlocal done
        made, layers = None, unstack(t)
        for i, layer in enumerate(layers):
            array = read(layer)
            made = put(array) if layers == (t,) else _insert(made, put(array), i, len(layers))
            done += array.nbytes
            if progress is not None:
                progress(layer.pieces[0].name, done, total)
        assert made is not None
        return made

    return jax.tree.map(leaf, model.tensors)


def _insert(stack: jax.Array | None, layer: jax.Array, at: int, layers: int) -> jax.Array:
    """A stack with one more of its layers, where the stack lies; it begins as None."""
    if stack is None:
        stack = jnp.zeros((layers, *layer.shape), layer.dtype, device=layer.sharding)
    return _put_in(stack, layer, at)


@functools.partial(jax.jit, donate_argnums=0)
def _put_in(stack: jax.Array, layer: jax.Array, at: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stack, layer, at, 0)


# The beginnings of names in checkpoints of a model alone, saved without what was around it.
BARE = ("vision_tower.", "multi_modal_projector.", "layers.", "embed_tokens.", "norm.")


def canonical_name(name: str) -> str:
    """The name as in the family's tables, whatever stood around the model when it was saved."""
    if name.startswith("model.language_model."):
        return "model." + name.removeprefix("model.language_model.")
    name = name.removeprefix("language_model.")
    if name.startswith(BARE):
        return "model." + name
    name = name.removeprefix("bert.").removeprefix("roberta.")
    for letter in "kv":  # some tools keep a cache's scales beside the projection
        name = name.replace(f"self_attn.{letter}_proj.{letter}_scale", f"self_attn.{letter}_scale")
    if name.endswith(("LayerNorm.gamma", "LayerNorm.beta")):  # the first of all BERTs
        return name.replace(".gamma", ".weight").replace(".beta", ".bias")
    return name


def check_names(model: Model, names: Iterable[str]) -> None:
    """Raise LoadError where the checkpoint and the model do not name the same tensors."""
    have = set(names)
    pieces = [piece for t in jax.tree.leaves(model.tensors) for piece in t.pieces]
    may = {piece.name for piece in pieces if piece.default is not None}
    want = {piece.name for piece in pieces} - may
    harmless = {"lm_head.weight"} if model.config.tied else set()
    extras = BERT_EXTRAS if model.config.family == "bert" else HARMLESS_BEGINNINGS
    left = {
        name
        for name in have - want - may - harmless
        if not name.endswith(HARMLESS_ENDINGS) and not name.startswith(extras)
    }
    if missing := want - have:
        also = f", and it has {_some(left)} that the model does not know" if left else ""
        raise LoadError(f"the checkpoint lacks {_some(missing)}{also}")
    if left:
        raise LoadError(f"the checkpoint has {_some(left)} that the model does not know")


def _some(names: set[str], most: int = 5) -> str:
    shown = ", ".join(sorted(names)[:most])
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''} ({shown}{more})"


def param_bytes(model: Model, dtype: Any) -> int:
    """Bytes of all parameters."""
    sizes = model.sizes
    leaves = jax.tree.leaves(model.tensors)
    return sum(
        math.prod(shape(t.axes, sizes)) * np.dtype(t.dtype or dtype).itemsize for t in leaves
    )


def random_params(
    model: Model, seed: int = 0, dtype: Any = np.float32, put: Put = jax.device_put
) -> Decoder:
    """Weights for measuring without a checkpoint: finite logits, no meaning.

    One block of normal numbers is drawn and repeated from a random offset, so that it costs a copy.
    """
    random = np.random.default_rng(seed)
    block = random.standard_normal(1_000_003, np.float32)
    sizes = model.sizes

    def leaf(t: Tensor) -> jax.Array:
        made, layers = None, unstack(t)
        if layers == (t,):
            return one(t)
        for i, layer in enumerate(layers):
            made = _insert(made, one(layer), i, len(layers))
        assert made is not None
        return made

    def one(t: Tensor) -> jax.Array:
        dims = shape(t.axes, sizes)
        if t.init != "normal":
            return put(np.full(dims, 1.0 if t.init == "ones" else 0.0, t.dtype or dtype))
        fan_in = _fan_in(t, dims)
        scaled = np.roll(block * fan_in**-0.5, random.integers(len(block))).astype(dtype)
        return put(np.resize(scaled, dims))

    return jax.tree.map(leaf, model.tensors)


def _fan_in(t: Tensor, dims: tuple[int, ...]) -> int:
    """Inputs per output: the first axis, after the experts; an embedding's is its width."""
    words = t.axes.split()
    if words[0] == "V":
        return dims[1]
    return dims[1] if words[0] == "X" else dims[0]
