"""GGUF files: any quantization the gguf package can undo, in one file or in numbered parts."""

import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as Type
from gguf.quants import dequantize

from octavo.models.sources.base import CHUNK, Checkpoint, CheckpointError, TokenizerFiles
from octavo.models.sources.gguf_config import config_of, generation_config_of
from octavo.models.sources.gguf_file import GGUFFile, read_gguf
from octavo.models.sources.gguf_names import Origin, origins, restore_rows

FLOATS: dict[Type, Any] = {
    Type.F32: np.float32,
    Type.F16: np.float16,
    Type.BF16: ml_dtypes.bfloat16,
    Type.F64: np.float64,
}
_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")


class GGUFTensors:
    """Tensors of a model, dequantized when asked for."""

    def __init__(self, files: list[GGUFFile], config: dict[str, Any]) -> None:
        self._home = {name: file for file in files for name in file.tensors}
        self._origins = origins(
            config["model_type"],
            {name: file.tensors[name].shape for name, file in self._home.items()},
            config["num_attention_heads"],
            config["num_key_value_heads"],
        )

    def names(self) -> list[str]:
        return list(self._origins)

    def shape(self, name: str) -> tuple[int, ...]:
        origin = self._origin(name)
        shape = self._home[origin.tensor].tensors[origin.tensor].shape
        return shape[1:] if origin.expert >= 0 else shape

    def get(self, name: str) -> np.ndarray:
        origin = self._origin(name)
        file = self._home[origin.tensor]
        raw = file.raw(origin.tensor)
        if origin.expert >= 0:
            raw = raw[origin.expert]
        if origin.heads:  # a row is whole in its bytes, so rows move before they are dequantized
            raw = restore_rows(_rows_of(raw, self.shape(name)), origin.heads)
        values = to_float(raw, file.tensors[origin.tensor].type, name).reshape(self.shape(name))
        return values - values.dtype.type(1) if origin.minus_one else values

    @property
    def nbytes(self) -> int:
        return sum(file.tensors[name].nbytes for name, file in self._home.items())

    def close(self) -> None:
        self._home = {}
        self._origins = {}

    def _origin(self, name: str) -> Origin:
        try:
            return self._origins[name]
        except KeyError:
            raise CheckpointError(f"the checkpoint has no tensor `{name}`") from None


def _rows_of(raw: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A bias is one row of bytes in the file: here each of its elements is a row."""
    return raw.reshape(shape[0], -1)


def to_float(raw: np.ndarray, kind: Type, name: str = "") -> np.ndarray:
    """Stored bytes u8[..., n] as floats: float types as they are, quantized ones as float32."""
    if kind in FLOATS:
        return np.ascontiguousarray(raw).view(FLOATS[kind])
    flat = np.ascontiguousarray(raw).reshape(-1)
    try:
        block, block_bytes = GGML_QUANT_SIZES[kind]
        # The package works through 16 rows at a time: long rows keep its loop short.
        step = max(CHUNK // block, 1) * block_bytes
        out = np.empty(flat.size // block_bytes * block, np.float32)
        for at in range(0, flat.size, step):
            piece = dequantize(flat[at : at + step], kind)
            out[at // block_bytes * block :][: piece.size] = piece
        return out
    except NotImplementedError:
        raise CheckpointError(
            f"tensor `{name}` is {kind.name}, which cannot be dequantized: "
            "take another quantization of this model"
        ) from None


def open_gguf(path: Path) -> Checkpoint:
    """A model from one .gguf file, or from all parts where `path` is one of them."""
    files = [read_gguf(part) for part in parts_of(path)]
    first = files[0]
    everything = GGUFFile(
        path=path,
        metadata=first.metadata,
        tensors={name: info for file in files for name, info in file.tensors.items()},
        metadata_end=first.metadata_end,
        pairs=first.pairs,
        version=first.version,
        data=first.data,
    )
    config = config_of(everything)
    return Checkpoint(
        path=first.path,
        format="gguf",
        config=config,
        tensors=GGUFTensors(files, config),
        tokenizer=TokenizerFiles(gguf=first.metadata),
        generation_config=generation_config_of(first.metadata),
    )


def parts_of(path: Path) -> list[Path]:
    """All parts of a split model, in order."""
    match = _PART.search(path.name)
    if match is None:
        return [path]
    count = int(match[2])
    stem = path.name[: match.start()]
    parts = [path.with_name(f"{stem}-{i:05d}-of-{count:05d}.gguf") for i in range(1, count + 1)]
    missing = [part.name for part in parts if not part.exists()]
    if missing:
        raise CheckpointError(
            f"{len(missing)} of {count} parts are missing from `{path.parent}`, "
            f"first `{missing[0]}`: download the rest"
        )
    return parts


def write_metadata(path: Path, to: Path) -> None:
    """A GGUF file with the metadata of another and no tensors: its tokenizer and template."""
    source = read_gguf(path)
    head = b"GGUF" + source.version.to_bytes(4, "little")
    counts = (0).to_bytes(8, "little") + source.pairs.to_bytes(8, "little")
    to.write_bytes(head + counts + source.data[24 : source.metadata_end])
