"""Safetensors: one file or shards with an index, memory-mapped, nothing copied.

    u64 n | n bytes of JSON: {name: {dtype, shape, data_offsets: [first, end)}} | data

The header is read here and not by the safetensors package because its numpy form knows no bfloat16.
"""

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from octavo.models.sources.base import Checkpoint, CheckpointError, TokenizerFiles
from octavo.models.sources.folder import read_json, read_optional_json
from octavo.models.sources.quantized import undo

DTYPES: dict[str, Any] = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I8": np.int8,
    "I16": np.int16,
    "U16": np.uint16,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I32": np.int32,
    "U32": np.uint32,
    "F32": np.float32,
    "F64": np.float64,
    "I64": np.int64,
    "U64": np.uint64,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
}
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies."""

    file: Path
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    start: int  # bytes from the beginning of the file
    nbytes: int


class SafeTensors:
    """Tensors of one or more .safetensors files."""

    def __init__(self, files: list[Path]) -> None:
        self._entries: dict[str, Entry] = {}
        self._maps: dict[Path, np.memmap[Any, Any]] = {}
        for file in files:
            for name, entry in read_header(file).items():
                if name in self._entries:
                    other = self._entries[name].file.name
                    raise CheckpointError(
                        f"tensor `{name}` is in both `{other}` and `{file.name}`: "
                        f"keep one set of files in `{file.parent}`"
                    )
                self._entries[name] = entry

    def names(self) -> list[str]:
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name).shape

    def dtype(self, name: str) -> np.dtype[Any]:
        """Of one tensor, without reading it."""
        return self._entry(name).dtype

    def get(self, name: str) -> np.ndarray:
        entry = self._entry(name)
        if entry.nbytes == 0:
            return np.empty(entry.shape, entry.dtype)
        if entry.file not in self._maps:
            self._maps[entry.file] = np.memmap(entry.file, np.uint8, "r")
        data = self._maps[entry.file][entry.start : entry.start + entry.nbytes]
        return np.asarray(data).view(entry.dtype).reshape(entry.shape)

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self._entries.values())

    def close(self) -> None:
        self._maps.clear()  # each map is closed when the last array that looks into it goes

    def _entry(self, name: str) -> Entry:
        try:
            return self._entries[name]
        except KeyError:
            raise CheckpointError(f"the checkpoint has no tensor `{name}`") from None


def open_safetensors(folder: Path) -> Checkpoint:
    """A Hugging Face folder with safetensors weights, quantized ones dequantized when asked for."""
    config = read_json(folder / "config.json")
    beside = read_optional_json(folder / "hf_quant_config.json").get("quantization") or {}
    scheme = config.get("quantization_config") or beside and {"quant_method": "modelopt"}
    tensors, quantized = undo(SafeTensors(weight_files(folder)), scheme or {})
    return Checkpoint(
        path=folder,
        format="safetensors",
        config=config,
        tensors=tensors,
        tokenizer=TokenizerFiles(folder=folder),
        generation_config=read_optional_json(folder / "generation_config.json"),
        quantized=quantized,
    )


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights; a shard named by the index and not there is an error."""
    if (folder / INDEX).exists():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"`{folder / INDEX}` has no weight_map: download it again")
        files = [folder / name for name in sorted(set(weight_map.values()))]
        missing = [file.name for file in files if not file.exists()]
        if missing:
            raise CheckpointError(
                f"{len(missing)} of {len(files)} shards are missing from `{folder}`, "
                f"first `{missing[0]}`: download the rest"
            )
        return files
    for pattern in ("model.safetensors", "model*.safetensors", "*.safetensors"):
        if files := sorted(folder.glob(pattern)):
            return files
    return []


def read_header(file: Path) -> dict[str, Entry]:
    """Name -> place of every tensor; a file that is not whole is an error."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > size - 8:
                raise CheckpointError(
                    f"`{file}` is damaged or cut off: its header wants {length} bytes and "
                    f"{size - 8} are there: download it again"
                )
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        entries = {
            name: _entry(file, 8 + length, size, name, fields) for name, fields in header.items()
        }
    except OSError as error:
        raise CheckpointError(f"`{file}` cannot be read: {error.strerror}") from None
    except CheckpointError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, struct.error):
        raise CheckpointError(
            f"`{file}` is not a whole safetensors file: download it again"
        ) from None
    return entries


def _entry(file: Path, base: int, size: int, name: str, fields: dict[str, Any]) -> Entry:
    if fields["dtype"] not in DTYPES:
        known = ", ".join(DTYPES)
        raise CheckpointError(
            f"tensor `{name}` in `{file}` is {fields['dtype']}: convert it to one of {known}"
        )
    dtype: np.dtype[Any] = np.dtype(DTYPES[fields["dtype"]])
    first, end = fields["data_offsets"]
    shape = tuple(int(n) for n in fields["shape"])
    if base + end > size:
        raise CheckpointError(
            f"`{file}` is cut off: tensor `{name}` ends at byte {base + end} and the file has "
            f"{size}: download it again"
        )
    if first < 0 or end - first != math.prod(shape) * dtype.itemsize:
        raise CheckpointError(
            f"`{file}` is damaged: tensor `{name}` of shape {list(shape)} and type "
            f"{fields['dtype']} cannot take {end - first} bytes: download it again"
        )
    return Entry(file, dtype, shape, base + first, end - first)
