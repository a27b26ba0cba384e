"""Mixtral: Llama with experts in every layer; the chosen experts' weights sum to one."""

from functools import partial

from octavo.models.config import ModelConfig
from octavo.models.layers import (
    Decoder,
    attention_tensors,
    decoder_tensors,
    expert_tensors,
    moe,
)
from octavo.models.llama import Layer, layer_tensors
from octavo.models.llama import forward as llama_forward

NAMES = ("w1", "w3", "w2")  # gate, up, down

forward = partial(llama_forward, feed_forward=moe)


def tensors(config: ModelConfig) -> Decoder:
    """The parameter tree, with a Tensor for every array."""

    def layer(i: int, at: str) -> Layer:
        experts = expert_tensors(config, f"{at}block_sparse_moe.", NAMES)
        return layer_tensors(at, attention_tensors(config, at), experts)

    return decoder_tensors(config, layer)
