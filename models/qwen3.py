"""Qwen 3: Llama with a norm over each head's queries and keys before they turn."""

from octavo.models.config import ModelConfig
from octavo.models.layers import Decoder, attention_tensors, decoder_tensors, mlp_tensors
from octavo.models.llama import Layer, forward, layer_tensors

__all__ = ["forward", "tensors"]


def tensors(config: ModelConfig) -> Decoder:
    """The parameter tree, with a Tensor for every array."""

    def layer(i: int, at: str) -> Layer:
        attention = attention_tensors(config, at, qk_norm="ones")
        return layer_tensors(at, attention, mlp_tensors(config, at))

    return decoder_tensors(config, layer)
