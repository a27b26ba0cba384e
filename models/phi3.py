"""Phi-3 and Phi-4: Llama, stored with query, key and value in one tensor, gate and up in one.

Some turn only a part of each head (`config.rope.partial`), the long ones by longrope.
"""

from dataclasses import replace

from octavo.models.config import ModelConfig
from octavo.models.layers import Attention, Decoder, Mlp, attention_tensors, decoder_tensors
from octavo.models.llama import Layer, forward, layer_tensors
from octavo.models.ops import Linear
from octavo.models.tensors import ALL, Piece, linear, tensor

__all__ = ["forward", "tensors"]


def tensors(config: ModelConfig) -> Decoder:
    """The parameter tree, with a Tensor for every array."""

    def layer(i: int, at: str) -> Layer:
        return layer_tensors(at, _attention(config, at), _mlp(at))

    return decoder_tensors(config, layer)


def _attention(config: ModelConfig, at: str) -> Attention:
    """The stored rows are all queries, then all keys, then all values: K * J * D in all."""
    name, whole = f"{at}self_attn.qkv_proj.weight", "KJD E"
    weight = tensor(
        "E K J D",
        Piece(name, "KGD E", (ALL, ALL, slice(0, -2)), whole=whole),
        Piece(name, "KD E", (ALL, ALL, -2), whole=whole, after="KGD"),
        Piece(name, "KD E", (ALL, ALL, -1), whole=whole, after="KGD KD"),
    )
    return replace(attention_tensors(config, at), qkv=Linear(weight))


def _mlp(at: str) -> Mlp:
    weight = tensor("E 2 F", Piece(f"{at}mlp.gate_up_proj.weight", "2F E"))
    return Mlp(gate_up=Linear(weight), down=linear("F E", f"{at}mlp.down_proj"))
