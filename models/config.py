"""ModelConfig: what the code must know of a model, read from the dict of its config.json.

Sizes carry the project's axis letters: V vocabulary, E model width, L layers, H query heads, K
key-value heads, D head size, F feed-forward width, X experts. Configs of every age are read: with
`rope_theta` and `rope_scaling` or with `rope_parameters`, with the text model under `text_config`,
and with the architecture names that GGUF files use.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from operator import index
from typing import Any

# Architecture or model_type, of Hugging Face or of GGUF: the family that reads it.
FAMILY_OF = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Gemma3ForCausalLM": "gemma3",
    "Gemma3ForConditionalGeneration": "gemma3",
    "Phi3ForCausalLM": "phi3",
    "MixtralForCausalLM": "mixtral",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma3": "gemma3",
    "gemma3_text": "gemma3",
    "phi3": "phi3",
    "mixtral": "mixtral",
    "qwen3_moe": "qwen3_moe",
    "qwen3moe": "qwen3_moe",
    # What only reads: embeddings, and scores for a text.
    "LlamaModel": "llama",
    "MistralModel": "llama",
    "Qwen2Model": "qwen2",
    "Qwen3Model": "qwen3",
    "LlamaForSequenceClassification": "llama",
    "Qwen2ForSequenceClassification": "qwen2",
    "Qwen3ForSequenceClassification": "qwen3",
    "BertModel": "bert",
    "BertForMaskedLM": "bert",
    "BertForSequenceClassification": "bert",
    "RobertaModel": "bert",
    "RobertaForMaskedLM": "bert",
    "RobertaForSequenceClassification": "bert",
    "XLMRobertaModel": "bert",
    "XLMRobertaForMaskedLM": "bert",
    "XLMRobertaForSequenceClassification": "bert",
    "bert": "bert",
    "roberta": "bert",
    "xlm-roberta": "bert",
}

# What a family means by a key that its config.json leaves out.
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"rms_norm_eps": 1e-6},
    "qwen2": {"rms_norm_eps": 1e-6},
    "qwen3": {"rms_norm_eps": 1e-6, "head_dim": 128},
    "phi3": {"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096},
    "mixtral": {"rms_norm_eps": 1e-5, "rope_theta": 1e6, "num_local_experts": 8}
    | {"num_experts_per_tok": 2, "num_key_value_heads": 8, "norm_topk_prob": True},
    "qwen3_moe": {"rms_norm_eps": 1e-6, "num_experts": 128, "num_experts_per_tok": 8}
    | {"moe_intermediate_size": 768},
    # The first multimodal checkpoints name only what differs from the smallest of them.
    "bert": {"layer_norm_eps": 1e-12, "hidden_act": "gelu", "type_vocab_size": 2}
    | {"max_position_embeddings": 512, "pad_token_id": 0},
    "gemma3": {"rms_norm_eps": 1e-6, "vocab_size": 262_208, "num_attention_heads": 8}
    | {"num_key_value_heads": 4, "head_dim": 256, "rope_theta": 1e6, "sliding_window": 4096}
    | {"max_position_embeddings": 131_072, "tie_word_embeddings": True}
    | {"hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256},
}

ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


class ModelConfigError(ValueError):
    """A config.json that cannot be served: which key, what it says, what would do."""


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding; which fields count depends on `kind`."""

    kind: str = "default"  # one of ROPE_KINDS
    theta: float = 10_000.0
    partial: float = 1.0  # share of the head that turns
    factor: float = 1.0
    original_len: int = 0  # positions of pretraining
    attention_factor: float | None = None  # None: follows from factor
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    mscale: float = 0.0  # yarn
    mscale_all_dim: float = 0.0  # yarn
    truncate: bool = True  # yarn
    short_factor: tuple[float, ...] = ()  # longrope
    long_factor: tuple[float, ...] = ()  # longrope


@dataclass(frozen=True)
class ModelConfig:
    """One model. Hashable, and complete: nothing else is read from config.json."""

    family: str
    architecture: str
    V: int  # vocabulary
    E: int  # model width
    L: int  # layers
    H: int  # query heads
    K: int  # key-value heads
    D: int  # head size
    F: int  # feed-forward width
    eps: float
    max_len: int  # max_position_embeddings
    rope: RopeConfig
    local_rope: RopeConfig | None = None  # of the layers that see a window, where it differs
    tied: bool = False  # the embedding is also the head
    windows: tuple[int, ...] = ()  # per layer: tokens a query sees, itself included; 0 sees all
    activation: str = "silu"
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    query_scale: float = 0.0  # multiplies q.k
    attention_softcap: float = 0.0
    final_softcap: float = 0.0
    kv_scales: bool = False  # layers have scales of cached keys and values (an 8-bit cache)
    embed_scale: float = 1.0
    X: int = 0  # experts
    top_k: int = 0  # experts per token
    expert_F: int = 0  # feed-forward width of one expert
    norm_top_k: bool = False  # the chosen experts' weights sum to one
    sparse: tuple[bool, ...] = ()  # per layer: experts instead of one feed-forward block
    eos_ids: tuple[int, ...] = ()
    bos_id: int | None = None
    labels: int = 0  # numbers that a classifier gives for a text; 0: there is none
    token_types: int = 0  # which of two texts a token is of: rows of that embedding
    real_V: int = 0  # words of the vocabulary, where V was padded to divide by shards; 0: V are
    first_position: int = 0  # row of the position embedding that the first token takes

    @property
    def generates(self) -> bool:
        """Whether the architecture says what comes next; one that does not only reads."""
        reads = ("Model", "SequenceClassification", "MaskedLM")
        return self.family != "bert" and not self.architecture.endswith(reads)

    @property
    def sizes(self) -> dict[str, int]:
        """The letters that weight shapes are written in (see tensors.py)."""
        group = self.H // self.K
        own = {"V": self.V, "E": self.E, "H": self.H, "K": self.K, "D": self.D, "F": self.F}
        own |= {"X": self.X, "f": self.expert_F, "G": group, "J": group + 2}
        read = {
            "e": self.E,
            "C": self.labels,
            "Y": self.token_types,
            "P": self.max_len + self.first_position,
        }
        return own | read

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "ModelConfig":
        """Parse the dict of a config.json. Raises ModelConfigError with one sentence."""
        family, architecture = _family(config)
        raw = {k: v for k, v in config.items() if v is not None}
        raw |= {k: v for k, v in (config.get("text_config") or {}).items() if v is not None}
        raw = DEFAULTS[family] | raw
        parsed = _parse(family, architecture, raw)
        if family != "bert":
            return parsed
        return replace(parsed, **_encoder_fields(architecture, raw, parsed.max_len))


def _family(config: Mapping[str, Any]) -> tuple[str, str]:
    names = [*(config.get("architectures") or ()), config.get("model_type") or ""]
    for name in names:
        if name in FAMILY_OF:
            family = FAMILY_OF[name]
            if family == "llama" and _experts(config):  # GGUF files call Mixtral llama
                family = "mixtral"
            return family, name
        if name:
            break  # model_type alone says too little of an architecture we do not know
    shown = ("Generation", "CausalLM", "BertModel", "RobertaModel")
    supported = ", ".join(n for n in FAMILY_OF if n.endswith(shown))
    raise ModelConfigError(
        f"unknown model architecture {names[0] or '(none named)'!r}; supported are {supported}"
    )


def _experts(config: Mapping[str, Any]) -> int:
    return config.get("num_local_experts") or config.get("num_experts") or 0


def _number(raw: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = raw.get(key, default)
    if value is None:
        raise ModelConfigError(f"config.json has no {key!r}, which this model family needs")
    if isinstance(value, bool) or not hasattr(value, "__index__") or index(value) <= 0:
        raise ModelConfigError(
            f"config.json says {key} is {value!r}; it must be a whole number above 0"
        )
    return index(value)


def _parse(family: str, architecture: str, raw: Mapping[str, Any]) -> ModelConfig:
    H = _number(raw, "num_attention_heads")
    K = _number(raw, "num_key_value_heads", H)
    E = _number(raw, "hidden_size")
    L = _number(raw, "num_hidden_layers")
    D = _number(raw, "head_dim", E // H)
    if H % K:
        raise ModelConfigError(
            f"config.json has {H} attention heads and {K} key-value heads; "
            "the first must be a multiple of the second"
        )
    max_len = _number(raw, "max_position_embeddings")
    rope, local_rope = _ropes(family, raw, max_len)
    bias = bool(raw.get("attention_bias", False)) and family in ("llama", "qwen3", "qwen3_moe")
    gemma = family == "gemma3"
    if gemma and raw.get("use_bidirectional_attention"):
        raise ModelConfigError("use_bidirectional_attention is not supported: it cannot generate")
    return ModelConfig(
        family=family,
        architecture=architecture,
        V=_number(raw, "vocab_size"),
        E=E,
        L=L,
        H=H,
        K=K,
        D=D,
        F=_number(raw, "intermediate_size", raw.get("moe_intermediate_size")),
        eps=float(raw["layer_norm_eps" if family == "bert" else "rms_norm_eps"]),
        max_len=max_len,
        rope=rope,
        local_rope=local_rope,
        tied=bool(raw.get("tie_word_embeddings", False)) or architecture.endswith("Model"),
        windows=_windows(family, architecture, raw, L),
        activation=_activation(raw),
        qkv_bias=bias or family == "qwen2",
        out_bias=bias,
        mlp_bias=bool(raw.get("mlp_bias", False)) and family == "llama",
        query_scale=(float(raw["query_pre_attn_scalar"]) if gemma else D) ** -0.5,
        attention_softcap=float(raw.get("attn_logit_softcapping", 0.0)) if gemma else 0.0,
        final_softcap=float(raw.get("final_logit_softcapping", 0.0)) if gemma else 0.0,
        embed_scale=E**0.5 if gemma else 1.0,
        eos_ids=_ids(raw.get("eos_token_id")),
        bos_id=next(iter(_ids(raw.get("bos_token_id"))), None),
        labels=_labels(architecture, raw),
        **_expert_fields(family, raw, L),
    )


def _encoder_fields(architecture: str, raw: Mapping[str, Any], max_len: int) -> dict[str, Any]:
    """Of encoders with learned positions; RoBERTa's begin after the padding token's id."""
    kind = raw.get("position_embedding_type", "absolute")
    if kind != "absolute" or raw.get("is_decoder"):
        raise ModelConfigError(
            f"config.json says position_embedding_type {kind!r} and is_decoder "
            f"{bool(raw.get('is_decoder'))}; this family is supported with 'absolute' and False"
        )
    first = int(raw["pad_token_id"]) + 1 if "roberta" in architecture.lower() else 0
    types = _number(raw, "type_vocab_size")
    return {"max_len": max_len - first, "first_position": first, "token_types": types, "tied": True}


def _labels(architecture: str, raw: Mapping[str, Any]) -> int:
    if not architecture.endswith("SequenceClassification"):
        return 0
    return len(raw.get("id2label") or ()) or int(raw.get("num_labels", 2))


def _ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list | tuple) else (int(value),)


def _activation(raw: Mapping[str, Any]) -> str:
    name = raw.get("hidden_activation") or raw.get("hidden_act") or "silu"
    known = {"silu": "silu", "swish": "silu", "gelu": "gelu"}
    known |= {"gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
    if name not in known:
        raise ModelConfigError(
            f"unknown activation {name!r}; supported are {', '.join(sorted(known))}"
        )
    return known[name]


def _expert_fields(family: str, raw: Mapping[str, Any], L: int) -> dict[str, Any]:
    if family not in ("mixtral", "qwen3_moe"):
        return {}
    X = _experts(raw)
    top_k = _number(raw, "num_experts_per_tok")
    if top_k > X:
        raise ModelConfigError(f"config.json chooses {top_k} experts per token but has only {X}")
    if family == "mixtral":
        sparse = (True,) * L
    else:
        dense, every = set(raw.get("mlp_only_layers") or ()), raw.get("decoder_sparse_step", 1)
        sparse = tuple(i not in dense and (i + 1) % every == 0 for i in range(L))
    width = raw.get("moe_intermediate_size") or raw["intermediate_size"]
    gguf = raw.get("architectures") == ["qwen3moe"]  # these files do not say, and all mean yes
    norm = bool(raw.get("norm_topk_prob", gguf))
    return {"X": X, "top_k": top_k, "expert_F": width, "norm_top_k": norm, "sparse": sparse}


def _windows(family: str, architecture: str, raw: Mapping[str, Any], L: int) -> tuple[int, ...]:
    """Per layer: the tokens a query sees, itself included; 0 sees all."""
    window = raw.get("sliding_window") or 0
    if family.startswith("qwen") and not raw.get("use_sliding_window", False):
        window = 0
    if architecture.startswith("Llama"):
        window = 0  # Llama has none, whatever its config.json carries along
    types = raw.get("layer_types")
    if types is None and family == "gemma3":
        period = raw.get("sliding_window_pattern") or 6
        types = ["sliding" if (i + 1) % period else "full" for i in range(L)]
    elif types is None and family in ("qwen2", "qwen3"):
        first = raw.get("max_window_layers", 28)
        types = ["sliding" if i >= first else "full" for i in range(L)]
    elif types is None:
        types = ["sliding"] * L
    if len(types) != L:
        raise ModelConfigError(f"config.json has {L} layers but {len(types)} layer_types")
    return tuple(window if "sliding" in t else 0 for t in types)


def _ropes(
    family: str, raw: Mapping[str, Any], max_len: int
) -> tuple[RopeConfig, RopeConfig | None]:
    """The rope of all layers, or of the full and of the window layers."""
    given: dict[str, Any] = dict(raw.get("rope_parameters") or {})
    if family == "gemma3":
        local = given.pop("sliding_attention", None) or {}
        full = given.pop("full_attention", None) or given or raw.get("rope_scaling") or {}
        theta = {"rope_theta": raw.get("rope_local_base_freq", 10_000.0)}
        return _rope(raw, full, max_len), _rope(raw, theta | local, max_len)
    given = given.get("full_attention") or given
    return _rope(raw, given | (raw.get("rope_scaling") or {}), max_len), None


def _rope(raw: Mapping[str, Any], given: Mapping[str, Any], max_len: int) -> RopeConfig:
    given = {k: v for k, v in given.items() if v is not None}
    kind = given.get("rope_type") or given.get("type") or "default"
    kind = {"su": "longrope"}.get(kind, kind)
    if kind not in ROPE_KINDS:
        raise ModelConfigError(
            f"unknown rope scaling {kind!r}; supported are {', '.join(ROPE_KINDS)}"
        )
    original = raw.get("original_max_position_embeddings")
    if original is None or kind not in ("longrope", "yarn", "llama3"):
        original = given.get("original_max_position_embeddings", max_len)
    if kind in ("linear", "dynamic", "llama3") and "factor" not in given:
        raise ModelConfigError(f"rope scaling {kind!r} needs a factor in config.json")
    if kind == "longrope" and not (given.get("short_factor") and given.get("long_factor")):
        raise ModelConfigError("rope scaling 'longrope' needs short_factor and long_factor")
    ratio = max_len / original if kind in ("longrope", "yarn") else 1.0
    plain = ["low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "truncate"]
    plain += ["mscale", "mscale_all_dim", "attention_factor"]
    return RopeConfig(
        kind=kind,
        theta=float(given.get("rope_theta", raw.get("rope_theta", 10_000.0))),
        partial=float(given.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0))),
        factor=float(given.get("factor", ratio)),
        original_len=int(original),
        short_factor=tuple(given.get("short_factor", ())),
        long_factor=tuple(given.get("long_factor", ())),
        **{key: given[key] for key in plain if key in given},
    )
