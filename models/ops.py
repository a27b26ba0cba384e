"""What a model asks of its backend, and the one form every projection has.

A model is a pure function of its parameters. It owns no cache and knows no device: `Ops` brings the
four operations whose best implementation depends on the hardware.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class Linear:
    """One projection: y = x @ weight + bias. Later also quantized, or with adapters."""

    weight: jax.Array  # [in, out...]; several trailing axes are one fused projection
    bias: jax.Array | None = None  # [out...]


@flax.struct.dataclass
class Stacks:
    """The layers of a model whose backend runs them in a loop over stacked weights.

    Layers i, i + period, ... have one tree, each of its arrays with a leading axis; what is left
    after the last whole period comes one by one. Projections are matrices, [in, out].
    """

    periods: tuple[Any, ...]  # a tree per layer of a period, arrays [L // period, ...]
    rest: tuple[Any, ...] = ()  # a tree per layer

    @property
    def loops(self) -> int:
        """How often a whole period runs."""
        return int(jax.tree.leaves(self.periods)[0].shape[0])

    def each(self) -> tuple[Any, ...]:
        """The layers one by one, as copies."""
        whole = (
            jax.tree.map(lambda a, i=i: a[i], tree)
            for i in range(self.loops)
            for tree in self.periods
        )
        return (*whole, *self.rest)


@dataclass(frozen=True)
class LayerSpec:
    """What the cache and the attention must know of one layer; static."""

    group: int = 0  # page group: layers of one group share one page table
    window: int = 0  # tokens a query sees, itself included; 0 sees all


@dataclass(frozen=True)
class AttentionSpec:
    """The static part of one attention call."""

    layer: LayerSpec
    scale: float  # multiplies q.k before the softmax
    softcap: float = 0.0  # logits become softcap * tanh(logits / softcap); 0 is off
    causal: bool = True  # False: a token sees those after it too (encoders, never with a cache)


class Across(Protocol):
    """The other shards of the model, for a program that runs on one of them."""

    @property
    def rank(
        self,
    ) -> jax.Array: ...  # i32[] which shard this is: it has that part of the vocabulary

    @property
    def expert_rank(self) -> jax.Array: ...  # i32[] and this part of the experts

    def total(self, x: jax.Array) -> jax.Array:
        """The sum of every shard's x, on each of them."""
        ...


def head(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x [R, E], weight [V, E] -> f32[R, V], accumulated in float32."""
    return jnp.einsum("re,ve->rv", x, weight, preferred_element_type=jnp.float32)


@dataclass(frozen=True)
class Ops:
    """The four operations a backend brings, three that it may, and the way to the other shards.

    attend(q [N, H, D], k [N, K, D], v [N, K, D], cache, spec: AttentionSpec) -> ([N, H, D], cache)
        stores this layer's keys and values in its pages, then attends. Which pages and positions:
        the step knows, the model does not. `cache` is one layer's cache, opaque here. A layer that
        has them adds sinks=f32[H] (a logit of each head that has no value) and
        kv_scales=f32[2, K] (what a stored key, a stored value is multiplied with).
    linear(x [N, in], Linear) -> [N, out...]
    grouped_linear(x [N, in], weight [X, in, out], sizes i32[X]) -> [N, out]
        rows of x are sorted by expert: the first sizes[0] rows meet weight[0], and so on; rows past
        the sum of sizes give anything finite. With `Stacks` a fourth argument, i32[], says where
        the X experts begin in a longer weight.
    layers(block, x, layers, cache, specs) -> (x, cache)
        applies block(x, layer_params, layer_cache, spec) -> (x, layer_cache) to each layer in turn.
        `layers` is a tuple of trees, or `Stacks` where the backend asked for them.
    dense_experts: neither sort nor top-k is there, so every expert meets every token.
    attend_packed(mixed [N, K, J, D], turn, norms, cache, spec, eps, offset) -> as attend, or None
        `attend` of the projections as they come: it norms (norms: weights [2, D] of queries and
        keys, plus `offset`, or None) and turns them too. None: do that first, then `attend`.
    gated_linear(x [N, E], Linear [E, 2, F], act) -> act(gate) * up of the two projections
        [N, F] in one kernel, where that is faster; act: a name in `layers.ACTIVATIONS`. None: one
        after the other.
    head(x [R, E], weight [V, E]) -> f32[R, V]
        logits, accumulated in float32.
    """

    attend: Callable[..., tuple[jax.Array, Any]]
    linear: Callable[[jax.Array, Linear], jax.Array]
    grouped_linear: Callable[..., jax.Array]
    layers: Callable[..., tuple[jax.Array, Any]]
    attend_packed: Callable[..., tuple[jax.Array, Any] | None] = lambda *_, **__: None
    gated_linear: Callable[..., jax.Array | None] = lambda *_: None
    head: Callable[[jax.Array, jax.Array], jax.Array] = head
    across: Across | None = None  # None: the model is whole
    dense_experts: bool = False  # every expert meets every token

    def closing(self, x: jax.Array, w: Linear) -> jax.Array:
        """The projection that ends a block: its input may be one shard's part of the whole."""
        if self.across is None:
            return self.linear(x, w)
        y = self.across.total(self.linear(x, Linear(w.weight)))
        return y if w.bias is None else y + w.bias
