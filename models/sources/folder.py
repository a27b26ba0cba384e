"""The JSON beside the weights of a Hugging Face folder."""

import json
from pathlib import Path
from typing import Any

from octavo.models.sources.base import CheckpointError


def read_json(path: Path, kind: type = dict) -> Any:
    """One JSON object (or list); damage is one sentence that names the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"`{path}` is missing: is this the model's own folder?") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(
            f"`{path}` is not valid JSON ({error}): copy or download it again"
        ) from None
    except OSError as error:
        raise CheckpointError(f"`{path}` cannot be read: {error.strerror}") from None
    if not isinstance(value, kind):
        wanted = "object" if kind is dict else "list"
        raise CheckpointError(f"`{path}` must hold one JSON {wanted}: copy or download it again")
    return value


def read_optional_json(path: Path) -> dict[str, Any]:
    """As `read_json`; a missing file is empty."""
    return read_json(path) if path.exists() else {}


TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


def has_tokenizer(folder: Path) -> bool:
    """True where a tokenizer could be built from the folder."""
    return any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model"))
