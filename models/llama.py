"""Llama-family decoders: Llama 1 to 3, Mistral (a window in every layer), SmolLM.

tokens i32[N] -> embed -> L x ( norm -> attention -> + -> norm -> mlp -> + ) -> norm -> [N, E]
"""

from typing import Any

import flax.struct
import jax

from octavo.models.config import ModelConfig
from octavo.models.layers import (
    Attention,
    Decoder,
    Fixed,
    Mlp,
    attention,
    attention_tensors,
    decoder_tensors,
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
    mlp: Mlp


def tensors(config: ModelConfig) -> Decoder:
    """The parameter tree, with a Tensor for every array."""
    return decoder_tensors(config, _layer)


def _layer(config: ModelConfig, i: int, at: str) -> Layer:
    return Layer(
        norm1=tensor("E", f"{at}input_layernorm.weight", init="ones"),
        attention=attention_tensors(config, at),
        norm2=tensor("E", f"{at}post_attention_layernorm.weight", init="ones"),
        mlp=mlp_tensors(config, at),
    )


def forward(
    fixed: Fixed, params: Decoder, tokens: jax.Array, positions: jax.Array, cache: Any, ops: Ops
) -> tuple[jax.Array, Any]:
    """tokens, positions i32[N] -> hidden [N, E], cache."""
    config = fixed.config
    turn = rotation(fixed.rope, positions)

    def block(x: jax.Array, w: Layer, kv: Any, spec: LayerSpec) -> tuple[jax.Array, Any]:
        a, kv = attention(fixed, w.attention, rms_norm(x, w.norm1, config.eps), turn, kv, spec, ops)
        x = x + a
        return x + gated_mlp(config, w.mlp, rms_norm(x, w.norm2, config.eps), ops), kv

    x = params.embed[tokens]
    x, cache = ops.layers(block, x, params.layers, cache, fixed.specs)
    return rms_norm(x, params.norm, config.eps), cache
