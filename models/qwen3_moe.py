"""Qwen 3 MoE: Qwen 3 with experts in most layers (`config.sparse`)."""

from functools import partial

import jax

from octavo.models.config import ModelConfig
from octavo.models.layers import (
    Decoder,
    Experts,
    Mlp,
    attention_tensors,
    decoder_tensors,
    expert_tensors,
    gated_mlp,
    mlp_tensors,
    moe,
)
from octavo.models.llama import Layer, layer_tensors
from octavo.models.llama import forward as llama_forward
from octavo.models.ops import Ops

NAMES = ("gate_proj", "up_proj", "down_proj")


def tensors(config: ModelConfig) -> Decoder:
    """The parameter tree, with a Tensor for every array."""

    def layer(i: int, at: str) -> Layer:
        attention = attention_tensors(config, at, qk_norm="ones")
        if config.sparse[i]:
            return layer_tensors(at, attention, expert_tensors(config, f"{at}mlp.", NAMES))
        return layer_tensors(at, attention, mlp_tensors(config, at))

    return decoder_tensors(config, layer)


def _feed_forward(config: ModelConfig, w: Mlp | Experts, x: jax.Array, ops: Ops) -> jax.Array:
    return moe(config, w, x, ops) if isinstance(w, Experts) else gated_mlp(config, w, x, ops)


forward = partial(llama_forward, feed_forward=_feed_forward)
