"""Weights: from tensors with Hugging Face names to a parameter tree, one parameter at a time.

Never more than one parameter of one layer is in host memory on its way: read, laid out and cast by
numpy, put; where layers are stacked, into its place in the stack.
"""

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from octavo.models.layers import Decoder
from octavo.models.registry import Model
from octavo.models.shards import STAGE
from octavo.models.tensors import Tensor, fill, kept, shape, unstack

Get = Callable[[str], np.ndarray]
Put = Callable[[np.ndarray, Tensor], jax.Array]  # a parameter, to its place
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


def on_this_device(array: np.ndarray, tensor: Tensor) -> jax.Array:
    """A parameter, where the model is whole and the device is jax's first."""
    return jax.device_put(kept(tensor, array))


class LoadError(ValueError):
    """Weights that do not fit the model: which, and how."""


def load_params(
    model: Model,
    get: Get,
    names: Iterable[str],
    dtype: Any,
    put: Put = on_this_device,
    progress: Progress | None = None,
) -> Decoder:
    """Read every parameter of `model` with `get` (by Hugging Face name), as `dtype`.

    Raises LoadError where a name is missing or left over, or a shape differs.
    """
    stored = {canonical_name(name): name for name in names}
    check_names(model, stored)
    sizes, known = model.sizes, model.config.sizes
    done, total = 0, param_bytes(model, dtype, sizes)

    def read(t: Tensor) -> np.ndarray:
        if t.init == "ranks":
            return ranks(model)
        padded = t.axes.startswith("V") and sizes["V"] > known["V"]
        out = (np.zeros if padded else np.empty)(shape(t.axes, sizes), t.dtype or dtype)
        for piece in t.pieces:
            want = shape(piece.whole or piece.axes, known)
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
            fill(out, t, piece, array, sizes, known)
        return out

    def make(t: Tensor) -> np.ndarray:
        nonlocal done
        array = read(t)
        done += array.nbytes
        if progress is not None and t.pieces:
            progress(t.pieces[0].name, done, total)
        return array

    return jax.tree.map(lambda t: _placed(t, make, put), model.tensors)


def _placed(t: Tensor, make: Callable[[Tensor], np.ndarray], put: Put) -> jax.Array:
    """One parameter on its device; of a stack, layer after layer."""
    layers = unstack(t)
    if layers == (t,):
        return put(make(t), t)
    stack: jax.Array | None = None
    for at, layer in enumerate(layers):
        array = put(make(layer), layer)
        if stack is None:
            form = _of_stack(array.sharding)
            shape, dtype = (len(layers), *array.shape), array.dtype
            stack = jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=form)()  # noqa: B023
        stack = _put_in(form, array.sharding)(stack, array, at)
    assert stack is not None
    return stack


def _of_stack(one: jax.sharding.Sharding) -> jax.sharding.Sharding:
    """Where a stack lies whose layers lie there."""
    if isinstance(one, jax.sharding.NamedSharding):
        return jax.sharding.NamedSharding(one.mesh, jax.P(STAGE, *one.spec))
    return one


@functools.cache
def _put_in(form: Any, one: Any) -> Callable[..., jax.Array]:
    """(stack, layer, at) -> the stack with one more layer, in the stack's memory."""
    if not isinstance(form, jax.sharding.NamedSharding):

        def put_in(stack: jax.Array, layer: jax.Array, at: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_index_in_dim(stack, layer, at, 0)

        return jax.jit(put_in, donate_argnums=0, out_shardings=form)

    def put_part(stack: jax.Array, layer: jax.Array, at: jax.Array) -> jax.Array:
        """Of one device, which may have other layers: those it writes as they were."""
        own = at - jax.lax.axis_index(STAGE) * stack.shape[0]
        place = jnp.clip(own, 0, stack.shape[0] - 1)
        before = jax.lax.dynamic_index_in_dim(stack, place, 0, keepdims=False)
        layer = jnp.where(own == place, layer, before)
        return jax.lax.dynamic_update_index_in_dim(stack, layer, place, 0)

    ins = (form.spec, one.spec, jax.P())
    cut = jax.shard_map(
        put_part, mesh=form.mesh, in_specs=ins, out_specs=form.spec, check_vma=False
    )
    return jax.jit(cut, donate_argnums=0)


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


def ranks(model: Model) -> np.ndarray:
    """i32[R, 2]: of each shard, its number and that of its experts."""
    rank = np.arange(model.shards.count, dtype=np.int32)
    return np.stack([rank, rank // model.shards.model], axis=1)


def param_bytes(model: Model, dtype: Any, sizes: Mapping[str, int] | None = None) -> int:
    """Bytes of all parameters on one device; with `model.sizes` those of all shards."""
    sizes = model.local_sizes if sizes is None else sizes
    leaves = jax.tree.leaves(model.tensors)
    return sum(
        math.prod(shape(t.axes, sizes)) * np.dtype(t.dtype or dtype).itemsize for t in leaves
    )


def random_params(
    model: Model,
    seed: int = 0,
    dtype: Any = np.float32,
    put: Put = on_this_device,
) -> Decoder:
    """Weights for measuring without a checkpoint: finite logits, no meaning.

    One block of normal numbers is drawn and repeated from a random offset, so that it costs a copy.
    """
    random = np.random.default_rng(seed)
    block = random.standard_normal(1_000_003, np.float32)
    sizes = model.sizes

    def make(t: Tensor) -> np.ndarray:
        if t.init == "ranks":
            return ranks(model)
        dims = shape(t.axes, sizes)
        if t.init != "normal":
            return np.full(dims, 1.0 if t.init == "ones" else 0.0, t.dtype or dtype)
        fan_in = _fan_in(t, dims)
        scaled = np.roll(block * fan_in**-0.5, random.integers(len(block))).astype(dtype)
        return np.resize(scaled, dims)

    return jax.tree.map(lambda t: _placed(t, make, put), model.tensors)


def _fan_in(t: Tensor, dims: tuple[int, ...]) -> int:
    """Inputs per output: the first axis, after the experts; an embedding's is its width."""
    words = t.axes.split()
    if words[0] == "V":
        return dims[1]
    return dims[1] if words[0] == "X" else dims[0]
