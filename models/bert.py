"""BERT and RoBERTa: encoders, which read a text in both directions and generate nothing.

tokens -> word + position + type -> norm -> L x ( attention -> + -> norm -> mlp -> + -> norm )

A classifier (BertForSequenceClassification) reads the hidden state of the first token through one
more layer; scoring a pair of texts is a classifier with one label.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from octavo.models.config import ModelConfig
from octavo.models.layers import ACTIVATIONS, Fixed
from octavo.models.ops import AttentionSpec, LayerSpec, Linear, Ops
from octavo.models.tensors import ALL, Piece, linear, tensor


@flax.struct.dataclass
class Norm:
    weight: jax.Array  # [E]
    bias: jax.Array  # [E]


@flax.struct.dataclass
class Layer:
    qkv: Linear  # [E, 3, H, D]
    out: Linear  # [H * D, E]
    norm1: Norm
    up: Linear  # [E, F]
    down: Linear  # [F, E]
    norm2: Norm


@flax.struct.dataclass
class Classifier:
    dense: Linear  # [E, E]
    out: Linear  # [E, C]


@flax.struct.dataclass
class Encoder:
    embed: jax.Array  # [V, E]
    positions: jax.Array  # [P, E]
    types: jax.Array  # [Y, E]
    norm: Norm
    layers: tuple[Layer, ...]
    classifier: Classifier | None


def layer_norm(x: jax.Array, w: Norm, eps: float) -> jax.Array:
    """(x - mean) / deviation * weight + bias over the last axis, in float32."""
    wide = x.astype(jnp.float32)
    centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
    scale = jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + eps)
    return (centred * scale * w.weight.astype(jnp.float32) + w.bias).astype(x.dtype)


def forward(
    fixed: Fixed,
    params: Encoder,
    tokens: jax.Array,
    positions: jax.Array,
    cache: Any,
    ops: Ops,
    types: jax.Array | None = None,
) -> tuple[jax.Array, Any]:
    """tokens, positions, types i32[N] -> hidden [N, E], cache. No types: all tokens are of one."""
    config = fixed.config

    def block(x: jax.Array, w: Layer, kv: Any, spec: LayerSpec) -> tuple[jax.Array, Any]:
        mixed = ops.linear(x, w.qkv)  # [N, 3, H, D]
        call = AttentionSpec(spec, scale=config.query_scale, causal=False)
        y, kv = ops.attend(mixed[:, 0], mixed[:, 1], mixed[:, 2], kv, call)
        y = ops.linear(y.reshape(-1, config.H * config.D), w.out)
        x = layer_norm(x + y, w.norm1, config.eps)
        y = ops.linear(ACTIVATIONS[config.activation](ops.linear(x, w.up)), w.down)
        return layer_norm(x + y, w.norm2, config.eps), kv

    x = params.embed.at[tokens].get(mode="clip")
    x += params.positions.at[positions + config.first_position].get(mode="clip")
    x += params.types[0] if types is None else params.types.at[types].get(mode="clip")
    x = layer_norm(x, params.norm, config.eps)
    return ops.layers(block, x, params.layers, cache, fixed.specs)


def logits(config: ModelConfig, params: Encoder, hidden: jax.Array, ops: Ops) -> jax.Array:
    """The classifier's numbers for first tokens: hidden [R, E] -> f32[R, C]."""
    assert params.classifier is not None, f"{config.architecture=}"
    pooled = jnp.tanh(ops.linear(hidden, params.classifier.dense))
    return ops.linear(pooled, params.classifier.out).astype(jnp.float32)


def tensors(config: ModelConfig) -> Encoder:
    """The parameter tree, with a Tensor for every array."""
    return Encoder(
        embed=tensor("V E", "embeddings.word_embeddings.weight"),
        positions=tensor("P E", "embeddings.position_embeddings.weight"),
        types=tensor("Y E", "embeddings.token_type_embeddings.weight"),
        norm=_norm("embeddings.LayerNorm"),
        layers=tuple(_layer(f"encoder.layer.{i}.") for i in range(config.L)),
        classifier=_classifier(config) if config.labels else None,
    )


def _layer(at: str) -> Layer:
    names = [f"{at}attention.self.{name}" for name in ("query", "key", "value")]
    weight = [Piece(f"{name}.weight", "HD E", (ALL, i)) for i, name in enumerate(names)]
    bias = [Piece(f"{name}.bias", "HD", (i,)) for i, name in enumerate(names)]
    return Layer(
        qkv=Linear(tensor("E 3 H D", *weight), tensor("3 H D", *bias, init="zeros")),
        out=linear("HD E", f"{at}attention.output.dense", bias=True),
        norm1=_norm(f"{at}attention.output.LayerNorm"),
        up=linear("E F", f"{at}intermediate.dense", bias=True),
        down=linear("F E", f"{at}output.dense", bias=True),
        norm2=_norm(f"{at}output.LayerNorm"),
    )


def _norm(at: str) -> Norm:
    return Norm(tensor("E", f"{at}.weight", init="ones"), tensor("E", f"{at}.bias", init="zeros"))


def _classifier(config: ModelConfig) -> Classifier:
    roberta = "roberta" in config.architecture.lower()
    names = (
        ("classifier.dense", "classifier.out_proj") if roberta else ("pooler.dense", "classifier")
    )
    dense, out = names
    return Classifier(
        dense=linear("E e", dense, bias=True),  # both sizes are E, and still it is turned round
        out=linear("E C", out, bias=True),
    )
