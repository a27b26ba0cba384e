"""GGUF tensors under their Hugging Face names: one row per tensor, and what the converter changed.

The converter to GGUF reorders the rows of llama's query and key projections (its rope turns
neighbours, Hugging Face's turns halves), stores Gemma's norms as 1 + w, and stacks all experts of a
layer in one tensor. Each is undone here.
"""

import re
from dataclasses import dataclass

import numpy as np

ROOT = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
FAMILY = {
    "gemma3_text": {
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    },
    "phi3": {"ffn_up": "mlp.gate_up_proj"},
    "mixtral": {"ffn_gate_inp": "block_sparse_moe.gate"},
    "qwen3_moe": {"ffn_gate_inp": "mlp.gate"},
}
EXPERTS = {
    "mixtral": {
        "ffn_gate": "block_sparse_moe.experts.{}.w1",
        "ffn_down": "block_sparse_moe.experts.{}.w2",
        "ffn_up": "block_sparse_moe.experts.{}.w3",
    },
    "qwen3_moe": {
        "ffn_gate": "mlp.experts.{}.gate_proj",
        "ffn_down": "mlp.experts.{}.down_proj",
        "ffn_up": "mlp.experts.{}.up_proj",
    },
}
# Tables of rope factors: they are part of the config, not weights.
NOT_WEIGHTS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
PERMUTED = ("llama", "mixtral")  # model types whose query and key rows were reordered
ONE_PLUS = ("gemma3_text",)  # model types whose norms were stored as 1 + w

_BLOCK = re.compile(r"blk\.(\d+)\.([a-z_]+?)(_exps)?(?:\.(\d+))?\.(weight|bias)$")


@dataclass(frozen=True)
class Origin:
    """Where one Hugging Face tensor comes from."""

    tensor: str  # GGUF name
    expert: int = -1  # index on the leading axis of a stacked tensor; -1: the whole tensor
    heads: int = 0  # rows are to be put back in order for this many heads
    minus_one: bool = False


def origins(
    model_type: str, tensors: dict[str, tuple[int, ...]], heads: int, kv_heads: int
) -> dict[str, Origin]:
    """Hugging Face name -> origin of everything in the file; unknown names keep their own."""
    out: dict[str, Origin] = {}
    layer = LAYER | FAMILY.get(model_type, {})
    for name, shape in tensors.items():
        if name in NOT_WEIGHTS or name.endswith(".rope_freqs.weight"):
            continue
        minus_one = model_type in ONE_PLUS and name.endswith("norm.weight")
        match = _BLOCK.match(name)
        if match is None:
            out[ROOT.get(name, name)] = Origin(name, minus_one=minus_one)
            continue
        index, part, stacked, expert, suffix = match.groups()
        prefix = f"model.layers.{index}."
        experts = EXPERTS.get(model_type, {})
        if stacked and part in experts:
            for x in range(shape[0]):
                out[f"{prefix}{experts[part].format(x)}.{suffix}"] = Origin(name, expert=x)
        elif expert is not None and part in experts:
            out[f"{prefix}{experts[part].format(expert)}.{suffix}"] = Origin(name)
        elif part in layer and not stacked and expert is None:
            turned = {"attn_q": heads, "attn_k": kv_heads} if model_type in PERMUTED else {}
            out[f"{prefix}{layer[part]}.{suffix}"] = Origin(
                name, heads=turned.get(part, 0), minus_one=minus_one
            )
        else:
            out[name] = Origin(name)
    return out


def restore_rows(rows: np.ndarray, heads: int) -> np.ndarray:
    """[heads * D, ...] with rope's pairs as neighbours -> with rope's pairs half a head apart."""
    pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)
