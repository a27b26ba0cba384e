"""GGUF metadata in the words of a Hugging Face config.json."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from octavo.models.sources.base import CheckpointError
from octavo.models.sources.gguf_file import GGUFFile

# GGUF architecture -> (class name, model_type) of Hugging Face.
ARCHITECTURES = {
    "llama": ("LlamaForCausalLM", "llama"),
    "qwen2": ("Qwen2ForCausalLM", "qwen2"),
    "qwen3": ("Qwen3ForCausalLM", "qwen3"),
    "qwen3moe": ("Qwen3MoeForCausalLM", "qwen3_moe"),
    "gemma3": ("Gemma3ForCausalLM", "gemma3_text"),
    "phi3": ("Phi3ForCausalLM", "phi3"),
}
# Control tokens that end a turn in one family or another; GGUF names only one end token itself.
END_OF_TURN = frozenset(
    ("<|im_end|>", "<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|end|>")
    + ("<end_of_turn>", "</s>", "<eos>")
)
CONTROL = 3
GEMMA3_27B_LAYERS = 62


def config_of(file: GGUFFile) -> dict[str, Any]:
    """A config.json-style dict: `architectures`, sizes, rope, window, token ids."""
    meta = _Section(file)
    arch = meta.architecture
    cls, model_type = ARCHITECTURES[arch]
    heads = int(meta.required("attention.head_count"))
    width = int(meta.required("embedding_length"))
    head_dim = int(meta.get("attention.key_length") or width // heads)
    embedding = file.tensors.get("token_embd.weight")
    config: dict[str, Any] = {
        "architectures": [cls],
        "model_type": model_type,
        "hidden_size": width,
        "intermediate_size": int(meta.get("feed_forward_length", 0)),
        "num_hidden_layers": int(meta.required("block_count")),
        "num_attention_heads": heads,
        "num_key_value_heads": int(meta.get("attention.head_count_kv", heads)),
        "head_dim": head_dim,
        "rms_norm_eps": _short(meta.required("attention.layer_norm_rms_epsilon")),
        "rope_theta": _short(meta.get("rope.freq_base", 10000.0)),
        "max_position_embeddings": int(meta.required("context_length")),
        "vocab_size": embedding.shape[0] if embedding else len(meta.tokens),
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
    }
    for key in ("bos", "eos", "padding", "unknown"):
        if (token := file.metadata.get(f"tokenizer.ggml.{key}_token_id")) is not None:
            name = {"padding": "pad", "unknown": "unk"}.get(key, key)
            config[f"{name}_token_id"] = int(token)
    if (scaling := _rope_scaling(meta, config)) is not None:
        config["rope_scaling"] = scaling
    config |= _FAMILY.get(arch, lambda _meta, _config: {})(meta, config)
    return config


def generation_config_of(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The tokens that end a generation, and what of sampling the file says."""
    ids = [metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom")]
    found = [int(token) for token in ids if token is not None]
    kinds = metadata.get("tokenizer.ggml.token_type", ())
    for index, token in enumerate(metadata.get("tokenizer.ggml.tokens", ())):
        if token in END_OF_TURN and index < len(kinds) and kinds[index] == CONTROL:
            found.append(index)
    config: dict[str, Any] = {"eos_token_id": list(dict.fromkeys(found))} if found else {}
    names = {"temp": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p"}
    for theirs, ours in names.items():
        if (value := metadata.get(f"general.sampling.{theirs}")) is not None:
            config[ours] = _short(value)
    return config


class _Section:
    """The keys of the file's own architecture."""

    def __init__(self, file: GGUFFile) -> None:
        self.file = file
        self.architecture = str(file.metadata.get("general.architecture", ""))
        if not self.architecture:
            raise CheckpointError(
                f"`{file.path}` does not say its architecture: it is damaged or holds no model"
            )
        if self.architecture not in ARCHITECTURES:
            raise CheckpointError(
                f"`{file.path}` holds the unknown architecture `{self.architecture}`: "
                f"known are {', '.join(ARCHITECTURES)}"
            )

    @property
    def tokens(self) -> list[str]:
        return list(self.file.metadata.get("tokenizer.ggml.tokens", ()))

    def get(self, key: str, default: Any = None) -> Any:
        value = self.file.metadata.get(f"{self.architecture}.{key}", default)
        if isinstance(value, np.ndarray):  # one number per layer, all the same in these families
            if not len(set(value.tolist())) == 1:
                raise CheckpointError(
                    f"`{self.file.path}` has layers of different sizes (`{key}`): "
                    "such models are not supported"
                )
            return value[0]
        return value

    def required(self, key: str) -> Any:
        if (value := self.get(key)) is None:
            raise CheckpointError(
                f"`{self.file.path}` has no `{self.architecture}.{key}`: it is damaged or "
                "was made by an old converter, convert it again"
            )
        return value

    def factors(self, tensor: str) -> list[float] | None:
        """One float32 tensor of the file, as a list."""
        if tensor not in self.file.tensors:
            return None
        return [float(x) for x in self.file.raw(tensor).reshape(-1).view(np.float32)]


def _rope_scaling(meta: _Section, config: dict[str, Any]) -> dict[str, Any] | None:
    kind = meta.get("rope.scaling.type", "none")
    if kind in ("linear", "yarn") and meta.get("rope.scaling.factor"):
        scaling = {"rope_type": kind, "factor": _short(meta.get("rope.scaling.factor"))}
        if kind == "yarn":
            original = meta.get("rope.scaling.original_context_length")
            if original is not None:
                scaling["original_max_position_embeddings"] = int(original)
            for theirs, ours in (
                ("yarn_beta_fast", "beta_fast"),
                ("yarn_beta_slow", "beta_slow"),
                ("yarn_attn_factor", "attention_factor"),
            ):
                if (value := meta.get(f"rope.scaling.{theirs}")) is not None:
                    scaling[ours] = _short(value)
        return scaling
    if (factors := meta.factors("rope_freqs.weight")) is not None:
        return _from_frequencies(factors, config)
    return None


def _from_frequencies(factors: list[float], config: dict[str, Any]) -> dict[str, Any] | None:
    """Divisors f32[D/2] of the rope frequencies: the llama3 rule if it gave them, else as they are.

    longrope with one list for both lengths and an attention factor of 1 divides by exactly these.
    """
    if all(factor == 1.0 for factor in factors):
        return None
    given = np.asarray(factors)
    theta = config["rope_theta"]
    for original in (8192, 4096, 16384, 32768):
        wavelength = 2 * np.pi * theta ** (np.arange(len(given)) / len(given))
        smooth = np.clip((original / wavelength - 1.0) / (4.0 - 1.0), 0.0, 1.0)
        rule = 1.0 / ((1.0 - smooth) / given.max() + smooth)
        if np.allclose(rule, given, rtol=1e-3):
            return {
                "rope_type": "llama3",
                "factor": _short(given.max()),
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": original,
            }
    return {
        "rope_type": "longrope",
        "short_factor": factors,
        "long_factor": factors,
        "attention_factor": 1.0,
        "original_max_position_embeddings": config["max_position_embeddings"],
    }


def _llama(meta: _Section, config: dict[str, Any]) -> dict[str, Any]:
    experts = int(meta.get("expert_count", 0))
    head_dim = int(meta.get("attention.key_length") or meta.get("rope.dimension_count") or 0)
    more: dict[str, Any] = {"head_dim": head_dim} if head_dim else {}
    if experts:
        more |= {
            "architectures": ["MixtralForCausalLM"],
            "model_type": "mixtral",
            "num_local_experts": experts,
            "num_experts_per_tok": int(meta.get("expert_used_count", 2)),
        }
    return more


def _qwen3moe(meta: _Section, config: dict[str, Any]) -> dict[str, Any]:
    return {
        "num_experts": int(meta.required("expert_count")),
        "num_experts_per_tok": int(meta.required("expert_used_count")),
        "moe_intermediate_size": int(meta.required("expert_feed_forward_length")),
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _gemma3(meta: _Section, config: dict[str, Any]) -> dict[str, Any]:
    layers, head_dim = config["num_hidden_layers"], config["head_dim"]
    per_head = config["hidden_size"] // config["num_attention_heads"]
    pattern = 6  # five layers with a window, then one without
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_act": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": per_head if layers == GEMMA3_27B_LAYERS else head_dim,
        "sliding_window": int(meta.required("attention.sliding_window")),
        "sliding_window_pattern": pattern,
        "layer_types": [
            "full_attention" if (i + 1) % pattern == 0 else "sliding_attention"
            for i in range(layers)
        ],
        "rope_local_base_freq": _short(meta.get("rope.freq_base_swa", 10000.0)),
        "attn_logit_softcapping": None,
        "final_logit_softcapping": _maybe(meta.get("final_logit_softcapping")),
    }


def _phi3(meta: _Section, config: dict[str, Any]) -> dict[str, Any]:
    more: dict[str, Any] = {"sliding_window": int(meta.get("attention.sliding_window", 0)) or None}
    rotated = int(meta.get("rope.dimension_count", config["head_dim"]))
    more["partial_rotary_factor"] = rotated / config["head_dim"]
    original = meta.get("rope.scaling.original_context_length")
    if original is not None:
        more["original_max_position_embeddings"] = int(original)
    short, long = (
        meta.factors("rope_factors_short.weight"),
        meta.factors("rope_factors_long.weight"),
    )
    if short and long:
        more["rope_scaling"] = {"rope_type": "longrope", "short_factor": short, "long_factor": long}
        if original is not None:
            more["rope_scaling"]["original_max_position_embeddings"] = int(original)
        if (factor := meta.get("rope.scaling.attn_factor")) is not None:
            more["rope_scaling"]["attention_factor"] = _short(factor)
    return more


_FAMILY = {"llama": _llama, "qwen3moe": _qwen3moe, "gemma3": _gemma3, "phi3": _phi3}


def _short(value: Any) -> float:
    """The shortest decimal that is this float32: 9.999999747e-06 was written as 1e-05."""
    return float(str(np.float32(value)))


def _maybe(value: Any) -> float | None:
    return None if value is None else _short(value)
