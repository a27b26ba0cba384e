"""The blocks that families share. Pure functions of their weights; N tokens lie flat.

tokens i32[N] -> embed -> L x block -> norm -> hidden [N, E] -> head -> logits f32[R, V]
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from octavo.models import tensors
from octavo.models.config import ModelConfig
from octavo.models.ops import AttentionSpec, LayerSpec, Linear, Ops, Stacks
from octavo.models.rope import Rope, rotate

Turn = tuple[jax.Array, jax.Array]  # cos and sin, each f32[N, 1, D'/2]


@flax.struct.dataclass
class Decoder:
    """The parameters of every family; only the layers differ."""

    embed: jax.Array  # [V, E] rows are gathered; as a head it is as fast as [E, V]
    layers: tuple[Any, ...] | Stacks  # one tree per layer
    norm: jax.Array  # [E]
    head: jax.Array | None  # [V, E]; None: the embedding serves; of a classifier [C, E]
    rank: jax.Array | None = None  # i32[1, 2] of this shard: `Across.rank`, `expert_rank`


@flax.struct.dataclass
class Attention:
    qkv: Linear  # [E, K, J, D] J = H/K queries, one key, one value; or [E, K J D]
    out: Linear  # [H * D, E]
    norms: jax.Array | None = None  # [2, D] of queries and of keys
    sinks: jax.Array | None = None  # f32[H] a logit without a value
    kv_scales: jax.Array | None = None  # f32[2, K] of the cache's keys and values


@flax.struct.dataclass
class Mlp:
    gate_up: Linear  # [E, 2, F], or [E, 2 F]
    down: Linear  # [F, E]


@flax.struct.dataclass
class Experts:
    router: Linear  # [E, X]
    gate_up: jax.Array  # [X, E, 2, f], or with `layer` [L, X, E, 2 f]
    down: jax.Array  # [X, f, E], or with `layer` [L, X, f, E]
    # i32[] of the L. A layer's experts are never cut out of their stack: a step reads few of them.
    layer: jax.Array | None = None

    def at(self, layer: jax.Array, take: Callable[[jax.Array], jax.Array]) -> "Experts":
        """One layer of stacked weights; `take` cuts it out of an array."""
        return replace(self, router=jax.tree.map(take, self.router), layer=layer)


@dataclass(frozen=True, eq=False)
class Fixed:
    """What `build` fixed: everything of a forward pass that is neither weight nor input."""

    config: ModelConfig
    specs: tuple[LayerSpec, ...]
    rope: Rope
    local_rope: Rope | None


LEAST = -3e38  # less than every logit, for devices without infinities

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


def embed(params: Decoder, tokens: jax.Array, ops: Ops) -> jax.Array:
    """tokens i32[N] -> [N, E]. An id outside the vocabulary takes the nearest row."""
    if ops.across is None:
        return params.embed.at[tokens].get(mode="clip")
    V = params.embed.shape[0]
    at = tokens - ops.across.rank * V
    mine = (at >= 0) & (at < V)
    rows = params.embed.at[jnp.where(mine, at, 0)].get(mode="promise_in_bounds")
    return ops.across.total(jnp.where(mine[:, None], rows, 0))


def rms_norm(x: jax.Array, weight: jax.Array, eps: float, offset: float = 0.0) -> jax.Array:
    """x / rms(x) * (offset + weight) over the last axis, in float32."""
    wide = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (wide * scale * (offset + weight.astype(jnp.float32))).astype(x.dtype)


def attention(
    fixed: Fixed,
    w: Attention,
    x: jax.Array,
    turn: Turn,
    kv: Any,
    spec: LayerSpec,
    ops: Ops,
) -> tuple[jax.Array, Any]:
    """x [N, E] -> [N, E], and this layer's cache with the new keys and values."""
    config = fixed.config
    mixed = whole(ops.linear(x, w.qkv), w.qkv)
    mixed = mixed.reshape(x.shape[0], config.K, -1, config.D)  # [N, K, J, D]
    call = AttentionSpec(spec, scale=config.query_scale, softcap=config.attention_softcap)
    extra = {"sinks": w.sinks, "kv_scales": w.kv_scales}
    extra = {name: given for name, given in extra.items() if given is not None}
    offset = norm_offset(config)
    packed = ops.attend_packed(mixed, turn, w.norms, kv, call, config.eps, offset, **extra)
    if packed is not None:
        y, kv = packed
        return ops.closing(y.reshape(-1, config.H * config.D), w.out), kv
    q = mixed[:, :, :-2].reshape(-1, config.H, config.D)
    k, v = mixed[:, :, -2], mixed[:, :, -1]  # [N, K, D]
    if w.norms is not None:
        q = rms_norm(q, w.norms[0], config.eps, offset)
        k = rms_norm(k, w.norms[1], config.eps, offset)
    q, k = rotate(q, turn), rotate(k, turn)
    y, kv = ops.attend(q, k, v, kv, call, **extra)
    return ops.closing(y.reshape(-1, config.H * config.D), w.out), kv


def whole(y: jax.Array, w: Linear) -> jax.Array:
    """What a `w` of several projections made, to be taken apart.

    XLA would rather take a matrix apart than its product, and copy the weight at every step.
    """
    return y if w.weight.ndim > 2 else jax.lax.optimization_barrier(y)


def norm_offset(config: ModelConfig) -> float:
    """Gemma stores its norm weights less one."""
    return 1.0 if config.family == "gemma3" else 0.0


def gated_mlp(config: ModelConfig, w: Mlp, x: jax.Array, ops: Ops) -> jax.Array:
    """x [N, E] -> down(act(gate(x)) * up(x)) [N, E]."""
    inner = ops.gated_linear(x, w.gate_up, config.activation)
    if inner is not None:
        return ops.closing(inner, w.down)
    both = whole(ops.linear(x, w.gate_up), w.gate_up)  # [N, 2, F], or [N, 2 F]
    gate, up = jnp.split(both, 2, axis=1) if both.ndim == 2 else (both[:, 0], both[:, 1])
    return ops.closing(ACTIVATIONS[config.activation](gate) * up, w.down)


def moe(config: ModelConfig, w: Experts, x: jax.Array, ops: Ops) -> jax.Array:
    """x [N, E] -> [N, E]: each token through its `top_k` experts, mixed by the router's weights.

    The N * top_k pairs of token and expert are sorted by expert, so that each expert meets its
    tokens as one matrix.
    """
    N, k = x.shape[0], config.top_k
    routed = ops.linear(x, w.router).astype(jnp.float32)  # [N, X]
    if ops.dense_experts:
        y = _dense_moe(config, w, x, routed)
        return y if ops.across is None else ops.across.total(y)
    chances = jax.nn.softmax(routed, axis=-1)
    share, expert = jax.lax.top_k(chances, k)  # [N, k]
    if config.norm_top_k:
        share = share / jnp.sum(share, axis=-1, keepdims=True)
    X = w.gate_up.shape[0 if w.layer is None else 1]
    # X are this shard's, which come first in the order.
    if X < chances.shape[1]:
        assert ops.across is not None
        expert = (expert - ops.across.expert_rank * X) % chances.shape[1]
        share = jnp.where(expert < X, share, 0)
    order = jnp.argsort(expert.reshape(-1))  # stable: sorted pair -> pair
    sizes = jnp.sum(expert.reshape(-1, 1) == jnp.arange(X), axis=0, dtype=jnp.int32)
    f = config.expert_F
    first: tuple[jax.Array, ...] = ()
    if w.layer is None:
        gate_up, down = w.gate_up.reshape(X, -1, 2 * f), w.down
    else:  # the experts of all layers, one behind another
        first, gate_up, down = (w.layer * X,), _flat(w.gate_up), _flat(w.down)
    both = ops.grouped_linear(x[order // k], gate_up, sizes, *first)
    inner = ACTIVATIONS[config.activation](both[:, :f]) * both[:, f:]
    y = ops.grouped_linear(inner, down, sizes, *first)  # [N * k, E], by expert
    y = y[jnp.argsort(order)].reshape(N, k, -1).astype(jnp.float32)  # by token
    y = jnp.sum(y * share[:, :, None], axis=1).astype(x.dtype)
    return y if ops.across is None else ops.across.total(y)


def _dense_moe(config: ModelConfig, w: Experts, x: jax.Array, routed: jax.Array) -> jax.Array:
    """The same for the router's f32[N, X], with every expert for every token and no sort.

    A token's experts are found one after another; among equals the first, as top_k has it.
    """
    weight = jnp.exp(routed - jnp.max(routed, axis=-1, keepdims=True))
    chances = weight / jnp.sum(weight, axis=-1, keepdims=True)
    place = jnp.arange(config.X, dtype=jnp.int32)
    left, share = chances, jnp.zeros_like(chances)
    for _ in range(config.top_k):
        best = left == jnp.max(left, axis=-1, keepdims=True)
        first = jnp.min(jnp.where(best, place, config.X), axis=-1, keepdims=True)
        share = jnp.where(place == first, chances, share)
        left = jnp.where(place == first, -1.0, left)
    if config.norm_top_k:
        share = share / jnp.sum(share, axis=-1, keepdims=True)
    out = jnp.zeros(x.shape, jnp.float32)
    for expert in range(config.X):
        both = jnp.einsum("ne,ejf->njf", x, w.gate_up[expert])
        inner = ACTIVATIONS[config.activation](both[:, 0]) * both[:, 1]
        out = out + (inner @ w.down[expert]).astype(jnp.float32) * share[:, expert, None]
    return out.astype(x.dtype)


def _flat(stack: jax.Array) -> jax.Array:
    """[L, X, ...] -> [L * X, ...]."""
    return stack.reshape(-1, *stack.shape[2:])


def logits(config: ModelConfig, params: Decoder, hidden: jax.Array, ops: Ops) -> jax.Array:
    """hidden [R, E] -> f32[R, V] (of a classifier f32[R, C]), accumulated in float32.

    A shard gives those of its part of the vocabulary; what pads the vocabulary is never likely.
    """
    out = ops.head(hidden, params.embed if params.head is None else params.head)
    if config.final_softcap:
        out = config.final_softcap * jnp.tanh(out / config.final_softcap)
    if ops.across is not None and config.real_V % out.shape[1]:  # the last shard has padding
        V = out.shape[1]
        out = jnp.where(jnp.arange(V) + ops.across.rank * V < config.real_V, out, LEAST)
    return out


def attention_tensors(config: ModelConfig, at: str, qk_norm: str = "") -> Attention:
    """The usual names. `qk_norm` is the init of the query and key norms; "" is no norms."""
    at += "self_attn."
    normed = (f"{at}q_norm.weight", f"{at}k_norm.weight")
    return Attention(
        qkv=tensors.qkv(config, at),
        out=tensors.linear("HD E", f"{at}o_proj", config.out_bias),
        norms=tensors.rows("D", *normed, init=qk_norm) if qk_norm else None,
        kv_scales=tensors.kv_scales(at) if config.kv_scales else None,
    )


def mlp_tensors(config: ModelConfig, at: str) -> Mlp:
    """The usual names."""
    down = tensors.linear("F E", f"{at}mlp.down_proj", config.mlp_bias)
    return Mlp(gate_up=tensors.gate_up(config, f"{at}mlp."), down=down)


def expert_tensors(config: ModelConfig, at: str, names: tuple[str, str, str]) -> Experts:
    """`names` are those of gate, up and down inside one expert."""

    def pieces(name: str, axes: str, *rest: tensors.Index) -> list[tensors.Piece]:
        into = rest[0] if rest else ()
        every = range(config.X)
        return [tensors.Piece(f"{at}experts.{x}.{name}.weight", axes, (x, *into)) for x in every]

    both = [(names[0], (tensors.ALL, 0)), (names[1], (tensors.ALL, 1))]
    return Experts(
        router=tensors.linear("E X", f"{at}gate"),
        gate_up=tensors.tensor("X E 2 f", *(p for n, j in both for p in pieces(n, "f E", j))),
        down=tensors.tensor("X f E", *pieces(names[2], "E f")),
    )


def decoder_tensors(
    config: ModelConfig, layer: Callable[[int, str], Any], norm: str = "ones"
) -> Decoder:
    """The tree of Tensors, given `layer(i, prefix of its names)`."""
    return Decoder(
        embed=tensors.tensor("V E", "model.embed_tokens.weight"),
        layers=tuple(layer(i, f"model.layers.{i}.") for i in range(config.L)),
        norm=tensors.tensor("E", "model.norm.weight", init=norm),
        head=_head(config),
    )


def _head(config: ModelConfig) -> Any:
    """What logits are made with: of the vocabulary, or of a classifier's labels."""
    if config.labels:
        return tensors.tensor("C E", "score.weight")
    return None if config.tied else tensors.tensor("V E", "lm_head.weight")
