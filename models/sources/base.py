"""What every source gives: a config, tensors by their Hugging Face names, and tokenizer files."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

CHUNK = 1 << 18  # weights that are dequantized at once: the temporaries stay in cache


class CheckpointError(ValueError):
    """A checkpoint that cannot be read: one sentence, with the next step."""


@dataclass(frozen=True)
class TokenizerFiles:
    """Enough to build the tokenizer without touching the weights: one of the two is set."""

    folder: Path | None = None  # tokenizer.json and its companions
    gguf: Mapping[str, Any] | None = None  # metadata that holds `tokenizer.ggml.*`


class Tensors(Protocol):
    """Named arrays that are read when asked for."""

    def names(self) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def get(self, name: str) -> np.ndarray: ...

    @property
    def nbytes(self) -> int: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class NoTensors:
    """The weights are not here by name; `reason` says how to get them."""

    reason: str

    def names(self) -> list[str]:
        return []

    def shape(self, name: str) -> tuple[int, ...]:
        raise CheckpointError(f"there is no tensor `{name}`: {self.reason}")

    def get(self, name: str) -> np.ndarray:
        raise CheckpointError(f"there is no tensor `{name}`: {self.reason}")

    @property
    def nbytes(self) -> int:
        return 0

    def close(self) -> None:
        pass


@dataclass(frozen=True)
class Checkpoint:
    """One model on disk. `get` is read-only and, where the file's layout allows, memory-mapped."""

    path: Path
    format: str  # "safetensors" | "gguf" | "orbax" | "dummy"
    config: dict[str, Any]  # in the style of a Hugging Face config.json
    tensors: Tensors
    tokenizer: TokenizerFiles
    generation_config: dict[str, Any] = field(default_factory=dict)
    quantized: str = ""  # how, where `get` makes floats of fewer bits

    def names(self) -> list[str]:
        """All tensors, by Hugging Face name."""
        return self.tensors.names()

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one tensor, without reading it."""
        return self.tensors.shape(name)

    def get(self, name: str) -> np.ndarray:
        """One tensor in its stored float type; quantized ones come as float32."""
        return self.tensors.get(name)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as stored."""
        return self.tensors.nbytes

    def close(self) -> None:
        """Forget the files; arrays that `get` gave stay valid."""
        self.tensors.close()
