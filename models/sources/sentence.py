"""What sentence-transformers wrote beside a model: how its hidden states become one vector.

    modules.json                      the parts, in order: transformer, pooling, normalization
    1_Pooling/config.json             pooling_mode_*: which hidden states count
    sentence_bert_config.json         max_seq_length

Models that come without these files are read as their kind is usually meant: the mean of an
encoder, the last token of a decoder, both normalized.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from octavo.models.sources.base import Checkpoint, CheckpointError
from octavo.models.sources.folder import read_json, read_optional_json

# pooling_mode_* of sentence-transformers: our name for it.
MODES = {"cls_token": "cls", "mean_tokens": "mean", "max_tokens": "max", "lasttoken": "last"}
MODULES = "modules.json"
SETTINGS = ("sentence_bert_config.json", "config_sentence_transformers.json")


@dataclass(frozen=True)
class Pooling:
    """How a text's hidden states become one vector."""

    mode: str  # cls | mean | max | last
    normalize: bool = True
    max_len: int = 0  # tokens that the model was made for; 0: as its config.json says
    dimensions: tuple[int, ...] = ()  # lengths that vectors may be cut to; () is any
    activation: str = "sigmoid"  # of a classifier with one label: sigmoid | identity


def is_sentence_model(checkpoint: Checkpoint) -> bool:
    """Whether sentence-transformers saved this model, to make embeddings with it."""
    return checkpoint.path.is_dir() and (checkpoint.path / MODULES).exists()


def pooling_of(checkpoint: Checkpoint, *, encoder: bool) -> Pooling:
    """From the files where there are any. Raises CheckpointError for parts that are not known."""
    config = checkpoint.config
    found = Pooling(
        mode="mean" if encoder else "last",
        dimensions=tuple(config.get("matryoshka_dimensions") or ()),
        activation=_activation(config),
    )
    if not is_sentence_model(checkpoint):
        return found
    folder = checkpoint.path
    sizes = read_optional_json(folder / SETTINGS[0])
    found = replace(found, max_len=int(sizes.get("max_seq_length") or 0), normalize=False)
    for module in _modules(folder):
        kind = str(module.get("type", "")).rsplit(".", 1)[-1]
        if kind == "Pooling":
            found = replace(found, mode=_mode(folder / str(module.get("path", "")) / "config.json"))
        elif kind == "Normalize":
            found = replace(found, normalize=True)
        elif kind != "Transformer":
            raise CheckpointError(
                f"`{folder / MODULES}` has the part `{kind}`, which is not supported: "
                "Transformer, Pooling and Normalize are"
            )
    return found


def sentence_files(folder: Path) -> list[str]:
    """The files of sentence-transformers in `folder`, by their paths inside."""
    if not (folder / MODULES).exists():
        return []
    inside = [f"{module.get('path')}/config.json" for module in _modules(folder)]
    names = [MODULES, *SETTINGS, *(name for name in inside if not name.startswith("/"))]
    return [name for name in names if (folder / name).is_file()]


def _modules(folder: Path) -> list[Mapping[str, Any]]:
    modules: Any = read_json(folder / MODULES, kind=list)
    return [module for module in modules if isinstance(module, Mapping)]


def _mode(file: Path) -> str:
    config = read_json(file)
    named = config.get("pooling_mode")  # newer files have one name instead of a flag each
    names = [named] if isinstance(named, str) else []
    if not names:
        flags = {k.removeprefix("pooling_mode_"): v for k, v in config.items()}
        names = [name for name, on in flags.items() if on is True and name in _EVERY]
    modes = {"cls": "cls", "mean": "mean", "max": "max"} | MODES
    if len(names) != 1 or names[0] not in modes:
        raise CheckpointError(
            f"`{file}` asks for the pooling {' and '.join(names) or 'of nothing'}: "
            f"one of {', '.join(MODES)} is supported"
        )
    return modes[names[0]]


_EVERY = (*MODES, "mean_sqrt_len_tokens", "weightedmean_tokens")


def _activation(config: Mapping[str, Any]) -> str:
    """What a cross-encoder's one number goes through."""
    own = config.get("sentence_transformers") or {}
    name = own.get("activation_fn") or config.get("sbert_ce_default_activation_function")
    kind = str(name or "torch.nn.modules.activation.Sigmoid").rsplit(".", 1)[-1]
    known = {"Sigmoid": "sigmoid", "Identity": "identity"}
    if kind not in known:
        raise CheckpointError(
            f"config.json puts scores through {kind}, which is not supported: "
            f"{' and '.join(known)} are"
        )
    return known[kind]
