"""`build`: from a ModelConfig to the pure functions of its family.

A new family is one file with `tensors(config)` and `forward(fixed, params, ...)`, a row in
FAMILIES, and its names in config.FAMILY_OF.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax

from octavo.models import bert, gemma3, layers, llama, mixtral, phi3, qwen2, qwen3, qwen3_moe
from octavo.models.config import ModelConfig, ModelConfigError
from octavo.models.layers import Decoder, Fixed
from octavo.models.ops import LayerSpec, Linear, Stacks
from octavo.models.rope import make_rope
from octavo.models.shards import ONE, Shards, check, local, whole
from octavo.models.tensors import Tensor, array_shape, flatten, stack, tensor


@dataclass(frozen=True)
class Family:
    tensors: Callable[[ModelConfig], Any]  # the parameter tree with Tensors for arrays
    forward: Callable[..., tuple[jax.Array, Any]]
    logits: Callable[..., jax.Array] = layers.logits


FAMILIES = {
    "llama": Family(llama.tensors, llama.forward),
    "qwen2": Family(qwen2.tensors, qwen2.forward),
    "qwen3": Family(qwen3.tensors, qwen3.forward),
    "gemma3": Family(gemma3.tensors, gemma3.forward),
    "phi3": Family(phi3.tensors, phi3.forward),
    "mixtral": Family(mixtral.tensors, mixtral.forward),
    "qwen3_moe": Family(qwen3_moe.tensors, qwen3_moe.forward),
    "bert": Family(bert.tensors, bert.forward, bert.logits),
}


@dataclass(frozen=True, eq=False)
class Model:
    """A model without its weights: pure functions and static facts."""

    config: ModelConfig  # of the checkpoint
    max_model_len: int
    forward: Callable[..., tuple[jax.Array, Any]]
    # forward(params, tokens i32[N], positions i32[N], cache, ops) -> (hidden [N, E], cache);
    # where config.token_types is set, `types` i32[N] may follow
    logits: Callable[..., jax.Array]  # logits(params, hidden [R, E], ops) -> f32[R, V]
    layer_specs: tuple[LayerSpec, ...]  # one per layer of a stage
    attention: tuple[int, int, int]  # H, K, D of one shard
    period: int  # layers i and i + period have the same specs and the same parameter tree
    tensors: Any  # the parameter tree with a Tensor for every array
    shards: Shards = ONE

    @property
    def whole(self) -> ModelConfig:
        """The sizes of the parameters, all shards together."""
        return whole(self.config, self.shards)

    @property
    def local(self) -> ModelConfig:
        """The sizes that a program sees, which runs on one shard."""
        return local(self.config, self.shards)

    def head(self, params: Any) -> Any:
        """The part of the parameters that `logits` reads."""
        return replace(params, layers=()) if isinstance(params, Decoder) else params

    def abstract_params(self, dtype: Any) -> Any:
        """The parameter tree with a ShapeDtypeStruct for every array."""
        sizes = self.sizes

        def leaf(t: Tensor) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(array_shape(t, sizes), t.dtype or dtype)

        return jax.tree.map(leaf, self.tensors)

    @property
    def sizes(self) -> dict[str, int]:
        """The letters of the shapes of parameters; R shards, L layers of a stack."""
        return self.whole.sizes | {"R": self.shards.count, "L": self.loops}

    @property
    def local_sizes(self) -> dict[str, int]:
        """The same for what one shard has."""
        return self.local.sizes | {"R": 1, "L": self.loops // self.shards.stage}

    @property
    def loops(self) -> int:
        """Layers of one stack, all stages together."""
        return len(self.layer_specs) * self.shards.stage // self.period


def build(
    config: ModelConfig,
    max_model_len: int,
    shards: Shards = ONE,
    *,
    stacked: bool = False,
    columns: int = 0,
) -> Model:
    """The model for sequences of up to `max_model_len` tokens, prompt and output.

    stacked: its layers are `Stacks`, for a backend that runs them in a loop; columns: with matrices
    in blocks of so many. With stages they always are: of a backend that has no loop, with one layer
    of each stage in a stack. Raises ModelConfigError where it cannot be cut into `shards`.
    """
    check(config, shards)
    family = FAMILIES[config.family]
    checkpoint, config = config, local(config, shards)
    specs = layer_specs(config.windows, max_model_len)
    slow = config.local_rope
    tree = family.tensors(whole(checkpoint, shards))
    period = _period(specs, tree.layers)
    each = _layers_of_a_stage(len(specs), period, shards.stage)
    fixed = Fixed(
        config=config,
        specs=specs[:each],
        rope=make_rope(config.rope, config.D, config.max_len, max_model_len),
        local_rope=make_rope(slow, config.D, config.max_len, max_model_len) if slow else None,
    )
    if stacked:
        trees = _flat(tree.layers, columns, config.sizes)
        tree = replace(tree, layers=_stacks(trees, period))
    elif shards.stage > 1:
        period = each
        tree = replace(tree, layers=_stacks(tree.layers, period))
    if shards.count > 1:
        tree = replace(tree, rank=tensor("R 2", init="ranks"))
    return Model(
        config=checkpoint,
        max_model_len=max_model_len,
        forward=partial(family.forward, fixed),
        logits=partial(family.logits, config),
        layer_specs=fixed.specs,
        attention=(config.H, config.K, config.D),
        period=period,
        tensors=tree,
        shards=shards,
    )


def layer_specs(windows: tuple[int, ...], max_model_len: int) -> tuple[LayerSpec, ...]:
    """Full layers are group 0, window layers group 1; where all have the window they are group 0.

    A window that no sequence can outgrow is none.
    """
    windows = tuple(w if w < max_model_len else 0 for w in windows)
    group = 1 if 0 in windows else 0
    return tuple(LayerSpec(group=group if w else 0, window=w) for w in windows)


def _flat(trees: tuple[Any, ...], columns: int, sizes: Mapping[str, int]) -> tuple[Any, ...]:
    """Trees of Tensors with projections as matrices.

    sizes: of one shard, which decides whether a matrix has whole blocks of columns.
    """
    return jax.tree.map(partial(_matrices, columns, sizes), trees, is_leaf=_is_projection)


def _stacks(trees: tuple[Any, ...], period: int) -> Stacks:
    """Trees of Tensors, one per layer, as stacks of whole periods and what is left."""
    whole = len(trees) // period * period
    periods = tuple(
        jax.tree.map(lambda *same: stack(same), *trees[at:whole:period]) for at in range(period)
    )
    return Stacks(periods, trees[whole:])


def _is_projection(node: Any) -> bool:
    return isinstance(node, Linear | layers.Experts)


def _matrices(columns: int, sizes: Mapping[str, int], node: Any) -> Any:
    """Projections as matrices: a loop over layers reads those where they lie, and copies others."""

    def matrix(t: Any, keep: int) -> Any:
        t = flatten(t, keep)
        whole_blocks = columns and array_shape(t, sizes)[-1] % columns == 0
        return replace(t, columns=columns) if whole_blocks else t

    flat: Any = flatten  # its leaves are Tensors, which stand for arrays
    if isinstance(node, Linear):
        bias = None if node.bias is None else flat(node.bias, 0)
        return Linear(matrix(node.weight, 1), bias)
    if isinstance(node, layers.Experts):
        router = _matrices(columns, sizes, node.router)
        gate_up, down = matrix(node.gate_up, 2), matrix(node.down, 2)
        return replace(node, router=router, gate_up=gate_up, down=down)
    return node


def _layers_of_a_stage(layers: int, period: int, stages: int) -> int:
    """How many; `layers` must be whole stages, and these whole periods."""
    if stages == 1:
        return layers
    if layers % stages or layers // stages % period:
        sizes = [n for n in range(2, layers + 1) if layers % n == 0 and layers // n % period == 0]
        kinds = f", which repeat every {period}," if period > 1 else ""
        raise ModelConfigError(
            f"{layers} layers{kinds} cannot be cut into {stages} stages alike; sizes of `stage` "
            f"that fit: {', '.join(map(str, sizes)) or 'none'}"
        )
    return layers // stages


def _period(specs: tuple[LayerSpec, ...], trees: tuple[Any, ...]) -> int:
    kinds = [(spec, jax.tree.structure(tree)) for spec, tree in zip(specs, trees, strict=True)]
    for period in range(1, len(kinds)):
        if all(a == b for a, b in zip(kinds, kinds[period:], strict=False)):
            return period
    return len(kinds)
