"""Llama-family decoders: Llama 1 to 3, Mistral (a window in every layer), SmolLM.

tokens i32[N] -> embed -> L x ( norm -> attention -> + -> norm -> mlp -> + ) -> norm -> [N, E]
"""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax

from octavo.models.config import ModelConfig
from octavo.models.layers import (
    Attention,
    Decoder,
    Experts,
    Fixed,
    Mlp,
    attention,
    attention_tensors,
    decoder_tensors,
    embed,
    gated_mlp,
    mlp_tensors,
    rms_norm,
)
from octavo.models.ops import LayerSpec, Ops
from octavo.models.rope import rotation
from octavo.models.tensors import tensor


@flax.struct.dataclass
class Layer:
    norm1: jax.Array  # [E]
    attention: Attention
    norm2: jax.Array  # [E]
    mlp: Mlp | Experts


def tensors(config: ModelConfig) -> Decoder:
    """The parameter tree, with a Tensor for every array."""
    return decoder_tensors(
        config,
        lambda i, at: layer_tensors(at, attention_tensors(config, at), mlp_tensors(config, at)),
    )


def layer_tensors(at: str, attention: Attention, mlp: Mlp | Experts) -> Layer:
    """A layer with the usual names of its norms."""
    return Layer(
        norm1=tensor("E", f"{at}input_layernorm.weight", init="ones"),
        attention=attention,
        norm2=tensor("E", f"{at}post_attention_layernorm.weight", init="ones"),
        mlp=mlp,
    )


def forward(
    fixed: Fixed,
    params: Decoder,
    tokens: jax.Array,
    positions: jax.Array,
    cache: Any,
    ops: Ops,
    feed_forward: Callable[..., jax.Array] = gated_mlp,
) -> tuple[jax.Array, Any]:
    """tokens, positions i32[N] -> hidden [N, E], cache.

    Serves every family of this shape: `feed_forward(config, layer.mlp, x, ops)` is what differs.
    """
    config = fixed.config
    turn = rotation(fixed.rope, positions)

    def block(x: jax.Array, w: Layer, kv: Any, spec: LayerSpec) -> tuple[jax.Array, Any]:
        normed = rms_norm(x, w.norm1, config.eps)
        a, kv = attention(fixed, w.attention, normed, turn, kv, spec, ops)
        x = x + a
        return x + feed_forward(config, w.mlp, rms_norm(x, w.norm2, config.eps), ops), kv

    x = embed(params, tokens, ops)
    x, cache = ops.layers(block, x, params.layers, cache, fixed.specs)
    return rms_norm(x, params.norm, config.eps), cache
