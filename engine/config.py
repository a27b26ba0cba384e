"""EngineConfig: what a user decides, in one place.

The same dataclass is the Python API's keywords, the command line's flags (`max_num_seqs` is
`--max-num-seqs`), the YAML file's keys, the log line and the table in the docs. What the engine
can derive is derived, logged, and not asked for.
"""

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self, get_args, get_type_hints

import yaml

MESH_AXES = ("data", "model", "expert", "stage")


def option(default: Any, help: str, choices: tuple[str, ...] = ()) -> Any:
    """A field that the command line and the docs can explain."""
    return field(default=default, metadata={"help": help, "choices": choices})


class ConfigError(ValueError):
    """A setting that cannot work: what and why (`message`), and what to write instead (`hint`)."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(f"{message}\nhint: {hint}" if hint else message)
        self.message = message
        self.hint = hint


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """What a user decides."""

    model: str = option(
        "smollm2-135m",
        "folder, .gguf file or Hugging Face repository of the checkpoint, or a built-in name "
        "(smollm2-135m, gemma3-270m, all-minilm-l6-v2)",
    )
    runner: str = option(
        "auto",
        "what the engine does: generate, or read texts into embeddings and scores (pooling); "
        "auto is what the model was made for",
        ("auto", "generate", "pooling"),
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
        "auto",
        "of cached keys and values; auto is dtype; fp8 and int8 take the checkpoint's k_scale and "
        "v_scale, which int8 needs",
        ("auto", "float32", "bfloat16", "float16", "fp8", "int8"),
    )
    max_model_len: int | str = option(
        "auto", "longest sequence, prompt and output; auto takes the longest that fits"
    )
    max_num_seqs: int = option(
        0, "sequences decoded together, of each data shard; 0 takes the backend's default"
    )
    max_num_batched_tokens: int = option(
        0, "prompt tokens in one step; 0 takes the backend's default"
    )
    seed: int = option(0, "seed of requests that bring none")
    mesh: str = option(
        "",
        "devices: model cuts the model, stage its row of layers, data copies it, as in "
        "data=2,model=4; "
        "auto decides by the model's size",
    )
    hosts: int | str = option(
        1, "hosts that run the model together, each with this command; auto asks their launcher"
    )
    host_index: int = option(-1, "which of the hosts this is; 0 is the leader, -1 looks it up")
    leader: str = option("", "address:port of the leader, the same on every host")
    device: str = option(
        "auto", "which hardware to run on", ("auto", "cpu", "gpu", "tpu", "neuron")
    )
    memory_utilization: float = option(0.9, "share of the device memory to use, in (0, 1]")
    num_pages: int = option(
        0, "pages of the key-value cache, of each data shard; 0 takes what memory allows"
    )
    page_size: int = option(0, "tokens per page, a power of two; 0 takes the backend's default")
    enable_prefix_caching: bool = option(True, "reuse the pages of prompts that begin alike")
    scheduling_policy: str = option(
        "fcfs",
        "order of waiting requests: first come, or lowest priority number",
        ("fcfs", "priority"),
    )
    steps_in_flight: int = option(2, "steps dispatched before the oldest is read; 1 to 8")
    generation_config: str = option(
        "auto",
        "sampling defaults from the model's generation_config.json, or none",
        ("auto", "none"),
    )
    max_logprobs: int = option(
        20, "most log probabilities a request may ask for per token; -1 is the whole vocabulary"
    )
    max_num_queued_reqs: int = option(16384, "requests that may wait; more are refused")
    grammar_time_limit: float = option(
        5.0, "seconds that a request's schema or grammar may take to compile; more is refused"
    )
    compilation_cache: str = option(
        "auto", "folder that keeps compiled programs; auto is the user's cache folder, none is off"
    )

    def overrides(self) -> dict[str, Any]:
        """The fields that differ from their defaults: what the log line prints."""
        return {f.name: v for f in fields(self) if (v := getattr(self, f.name)) != f.default}

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], origin: str = "the settings") -> Self:
        """A checked config from values by name; `max-num-seqs` and `max_num_seqs` are one name."""
        named = {str(key).replace("-", "_"): value for key, value in values.items()}
        known = [f.name for f in fields(cls)]
        for name in named:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean `{near[0]}`?" if near else f"the names are {', '.join(known)}"
                raise ConfigError(f"{origin}: there is no setting `{name}`", hint)
        config = cls(**named)
        config.validate()
        return config

    @classmethod
    def from_yaml(cls, path: str | Path, **overrides: Any) -> Self:
        """A checked config from a YAML file of `name: value` lines; `overrides` win over it."""
        return cls.from_mapping({**read_yaml(path), **overrides}, origin=str(path))

    def validate(self) -> None:
        """Raise ConfigError, one sentence and a hint, for the first setting that cannot work."""
        for name, types in field_types().items():
            _check_type(name, getattr(self, name), types)
        for f in fields(self):
            _check_choice(f.name, getattr(self, f.name), f.metadata["choices"])
        if not self.model:
            raise ConfigError("`model` is empty", "name a folder, a .gguf file or smollm2-135m")
        _check_max_model_len(self.max_model_len)
        for name, low, high in _RANGES:
            _check_range(name, getattr(self, name), low, high)
        if not 0.0 < self.memory_utilization <= 1.0:
            raise ConfigError(
                f"`memory_utilization` must be above 0, at most 1, got {self.memory_utilization}",
                "0.9 leaves a tenth of the device memory to others",
            )
        if not 0.0 < self.grammar_time_limit <= 600.0:
            raise ConfigError(
                "`grammar_time_limit` must be above 0 and at most 600 seconds, "
                f"got {self.grammar_time_limit}",
                "the default is 5",
            )
        if self.num_pages == 1:
            raise ConfigError(
                "`num_pages` must be at least 2, got 1: page 0 only takes padding",
                "0 takes what memory allows",
            )
        if self.page_size & (self.page_size - 1):
            raise ConfigError(
                f"`page_size` must be a power of two, got {self.page_size}",
                "0 takes the backend's default; 16, 32, 64 and 128 are usual",
            )
        parse_mesh(self.mesh)
        if self.hosts != "auto" and (isinstance(self.hosts, str) or self.hosts < 1):
            raise ConfigError(
                f"`hosts` must be `auto` or at least 1, got {self.hosts!r}", "the default is 1"
            )


# name, lowest, highest: None is no bound.
_RANGES: tuple[tuple[str, int, int | None], ...] = (
    ("max_num_seqs", 0, None),
    ("max_num_batched_tokens", 0, None),
    ("num_pages", 0, None),
    ("page_size", 0, None),
    ("steps_in_flight", 1, 8),
    ("max_logprobs", -1, None),
    ("max_num_queued_reqs", 1, None),
    ("seed", 0, 2**64 - 1),
    ("host_index", -1, None),
)


def field_types() -> dict[str, tuple[type, ...]]:
    """The types that each setting takes: (int,), (int, str), ..."""
    hints = get_type_hints(EngineConfig)
    return {f.name: get_args(hints[f.name]) or (hints[f.name],) for f in fields(EngineConfig)}


def flag(name: str) -> str:
    """The command line's spelling of a setting."""
    return "--" + name.replace("_", "-")


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file; ConfigError when it cannot be read or is no mapping."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"cannot read the settings file {path}: {(error.strerror or str(error)).lower()}",
            "--config takes a file of `name: value` lines",
        ) from None
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path} must hold `name: value` lines, got a {type(values).__name__}",
            "for example `max_num_seqs: 64`",
        )
    return values


def parse_mesh(text: str) -> dict[str, int]:
    """`data=1,model=8` as {"data": 1, "model": 8}; empty is one device.

    `auto` is empty too: what it becomes is known when the model and the devices are.
    """
    sizes: dict[str, int] = {}
    if text == "auto":
        return sizes
    for part in filter(None, text.split(",")):
        axis, _, size = (piece.strip() for piece in part.partition("="))
        hint = "write it as --mesh model=8, --mesh data=2,model=4 or --mesh auto"
        if axis not in MESH_AXES:
            raise ConfigError(f"`mesh` has no axis `{axis}`: {', '.join(MESH_AXES)}", hint)
        if axis in sizes:
            raise ConfigError(f"`mesh` names the axis `{axis}` twice in {text!r}", hint)
        if not size.isdecimal() or int(size) < 1:
            raise ConfigError(f"`mesh` needs at least 1 device on `{axis}`, got {size!r}", hint)
        sizes[axis] = int(size)
    return sizes


def devices_of(mesh: str) -> int:
    """How many devices `data=1,model=8` needs."""
    return math.prod(parse_mesh(mesh).values())


def settings_table() -> str:
    """The settings as a Markdown table: one row a field, for the docs."""
    lines = ["| Setting | Flag | Default | What it is |", "|---|---|---|---|"]
    for f in fields(EngineConfig):
        default = "on" if f.default is True else "off" if f.default is False else f.default
        choices = f.metadata["choices"]
        extra = " (" + ", ".join(f"`{c}`" for c in choices) + ")" if choices else ""
        spelled = flag(f.name)
        if isinstance(f.default, bool):
            spelled += "`, `--no-" + flag(f.name)[2:]
        shown = f"`{default}`" if default != "" else ""
        lines.append(f"| `{f.name}` | `{spelled}` | {shown} | {f.metadata['help']}{extra} |")
    return "\n".join(lines) + "\n"


def _check_type(name: str, value: Any, types: tuple[type, ...]) -> None:
    is_bool = isinstance(value, bool)
    accepted = (*types, int) if float in types else types
    if is_bool != (bool in types) or not isinstance(value, accepted):
        wanted = " or ".join(t.__name__ for t in types)
        raise ConfigError(
            f"`{name}` must be {wanted}, got {value!r} ({type(value).__name__})",
            f"on the command line it is {flag(name)}",
        )


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if choices and value not in choices:
        near = difflib.get_close_matches(str(value), choices, n=1)
        hint = f"did you mean `{near[0]}`?" if near else f"write {flag(name)} {choices[0]}"
        raise ConfigError(f"`{name}` must be one of {', '.join(choices)}, got `{value}`", hint)


def _check_range(name: str, value: int, low: int, high: int | None) -> None:
    if value < low or (high is not None and value > high):
        bounds = f"at least {low}" if high is None else f"from {low} to {high}"
        default = next(f.default for f in fields(EngineConfig) if f.name == name)
        raise ConfigError(f"`{name}` must be {bounds}, got {value}", f"the default is {default}")


def _check_max_model_len(value: int | str) -> None:
    if value == "auto" or (isinstance(value, int) and value >= 1):
        return
    raise ConfigError(
        f"`max_model_len` must be `auto` or at least 1, got {value!r}",
        "auto takes the longest sequence that fits; or write --max-model-len 4096",
    )
