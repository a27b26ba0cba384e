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
from octavo.models.tensors import rows


@flax.struct.dataclass
class Layer:
    norms: jax.Array  # [2, E] before attention, before the mlp
    attention: Attention
    mlp: Mlp | Experts


def tensors(config: ModelConfig) -> Decoder:
    """The parameter tree, with a Tensor for every array."""
    return decoder_tensors(
        config,
        lambda i, at: layer_tensors(at, attention_tensors(config, at), mlp_tensors(config, at)),
    )


def layer_tensors(at: str, attention: Attention, mlp: Mlp | Experts) -> Layer:
    """A layer with the usual names of its norms."""
    names = (f"{at}input_layernorm.weight", f"{at}post_attention_layernorm.weight")
    return Layer(
        norms=rows("E", *names, init="ones"),
        attention=attention,
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
        inner = rms_norm(x, w.norms[0], config.eps)
        a, kv = attention(fixed, w.attention, inner, turn, kv, spec, ops)
        x = x + a
        return x + feed_forward(config, w.mlp, rms_norm(x, w.norms[1], config.eps), ops), kv

    x = embed(params, tokens, ops)
    x, cache = ops.layers(block, x, params.layers, cache, fixed.specs)
    return rms_norm(x, params.norm, config.eps), cache
