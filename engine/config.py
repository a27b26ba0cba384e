"""EngineConfig: what a user decides, in one place.

The same dataclass is the Python API's keywords, the command line's flags (`max_num_seqs` is
`--max-num-seqs`), the YAML file's keys, the log line and the table in the README. What the engine can
derive is derived, logged, and not asked for.
"""

from dataclasses import dataclass, field, fields
from typing import Any


def option(default: Any, help: str, choices: tuple[str, ...] = ()) -> Any:
    """A field that the command line and the docs can explain."""
    return field(default=default, metadata={"help": help, "choices": choices})


class ConfigError(ValueError):
    """A setting that cannot work: what it was, why, and what to write instead."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """What a user decides."""

    model: str = option(
        "smollm2-135m",
        "folder, .gguf file or Hugging Face repository of the checkpoint, or a built-in name "
        "(smollm2-135m, gemma3-270m)",
    )
    tokenizer: str = option("", "folder or repository of the tokenizer, where the model has none")
    revision: str = option("", "branch, tag or commit of a Hugging Face repository")
    offline: bool = option(False, "use what is on disk and never ask the hub")
    load_format: str = option(
        "auto",
        "how to read the weights; dummy makes random ones from config.json alone",
        ("auto", "safetensors", "gguf", "orbax", "dummy"),
    )
    dtype: str = option(
        "auto",
        "of weights and activations; auto takes what the backend does best",
        ("auto", "float32", "bfloat16", "float16"),
    )
    kv_cache_dtype: str = option(
        "auto", "of cached keys and values; auto is dtype", ("auto", "float32", "bfloat16", "float16")
    )
    max_model_len: int | str = option(
        "auto", "longest sequence, prompt and output; auto takes the longest that fits"
    )
    max_num_seqs: int = option(0, "sequences decoded together; 0 takes the backend's default")
    max_num_batched_tokens: int = option(
        0, "prompt tokens in one step; 0 takes the backend's default"
    )
    seed: int = option(0, "seed of requests that bring none")
    mesh: str = option("", "devices, as in data=1,model=8")
    device: str = option(
        "auto", "which hardware to run on", ("auto", "cpu", "gpu", "tpu", "neuron")
    )
    memory_utilization: float = option(0.9, "share of the device memory to use, in (0, 1]")
    num_pages: int = option(0, "pages of the key-value cache; 0 takes what memory allows")
    page_size: int = option(0, "tokens per page, a power of two; 0 takes the backend's default")
    enable_prefix_caching: bool = option(True, "reuse the pages of prompts that begin alike")
    scheduling_policy: str = option(
        "fcfs", "order of waiting requests: first come, or lowest priority number", ("fcfs", "priority")
    )
    steps_in_flight: int = option(2, "steps dispatched before the oldest is read; 1 to 8")
    generation_config: str = option(
        "auto", "sampling defaults from the model's generation_config.json, or none", ("auto", "none")
    )
    max_logprobs: int = option(20, "most log probabilities a request may ask for per token")
    max_num_queued_reqs: int = option(16384, "requests that may wait; more are refused")
    compilation_cache: str = option(
        "auto", "folder that keeps compiled programs; auto is the user's cache folder, none is off"
    )

    def overrides(self) -> dict[str, Any]:
        """The fields that differ from their defaults: what the log line prints."""
        return {f.name: v for f in fields(self) if (v := getattr(self, f.name)) != f.default}
