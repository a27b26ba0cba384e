"""Gemma 3, the text model: most layers see a window and turn by their own theta, the rest see all.

    tokens i32[N] -> embed * sqrt(E)
        -> L x ( norm -> attention -> norm -> + -> norm -> mlp -> norm -> + ) -> norm -> [N, E]

Norm weights are stored less one, queries and keys are normed per head.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from octavo.models.config import ModelConfig
from octavo.models.layers import (
    Attention,
    Decoder,
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
    norm1: jax.Array  # [E] before attention
    attention: Attention
    norm2: jax.Array  # [E] after it
    norm3: jax.Array  # [E] before the mlp
    mlp: Mlp
    norm4: jax.Array  # [E] after it
    # Whether the layer turns by the local theta. Its LayerSpec cannot say so: a window that no
    # sequence can outgrow is dropped there.
    local: bool = flax.struct.field(pytree_node=False, default=False)


def tensors(config: ModelConfig) -> Decoder:
    """The parameter tree, with a Tensor for every array."""

    def layer(i: int, at: str) -> Layer:
        def norm(name: str) -> Any:
            return tensor("E", f"{at}{name}_layernorm.weight", init="zeros")

        return Layer(
            norm1=norm("input"),
            attention=attention_tensors(config, at, qk_norm="zeros"),
            norm2=norm("post_attention"),
            norm3=norm("pre_feedforward"),
            mlp=mlp_tensors(config, at),
            norm4=norm("post_feedforward"),
            local=config.windows[i] > 0,
        )

    return decoder_tensors(config, layer, norm="zeros")


def forward(
    fixed: Fixed, params: Decoder, tokens: jax.Array, positions: jax.Array, cache: Any, ops: Ops
) -> tuple[jax.Array, Any]:
    """tokens, positions i32[N] -> hidden [N, E], cache."""
    config = fixed.config
    turn = rotation(fixed.rope, positions)
    local_turn = rotation(fixed.local_rope or fixed.rope, positions)

    def norm(x: jax.Array, weight: jax.Array) -> jax.Array:
        return rms_norm(x, weight, config.eps, offset=1.0)

    def block(x: jax.Array, w: Layer, kv: Any, spec: LayerSpec) -> tuple[jax.Array, Any]:
        own_turn = local_turn if w.local else turn
        a, kv = attention(fixed, w.attention, norm(x, w.norm1), own_turn, kv, spec, ops)
        x = x + norm(a, w.norm2)
        y = gated_mlp(config, w.mlp, norm(x, w.norm3), ops)
        return x + norm(y, w.norm4), kv

    x = embed(params, tokens, ops)
    x = x * jnp.asarray(config.embed_scale, x.dtype)
    x, cache = ops.layers(block, x, params.layers, cache, fixed.specs)
    return norm(x, params.norm), cache
