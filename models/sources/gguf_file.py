"""The GGUF container: metadata and where each tensor lies. The whole file is one read-only map.

    "GGUF" | u32 version | u64 tensors | u64 pairs | pairs | tensor table | padding | data

It is read here and not by the gguf package's reader, which makes one numpy view per array element:
8 s for the metadata of a vocabulary of 262,144 entries, against 0.3 s.
"""

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from octavo.models.sources.base import CheckpointError

STRING, ARRAY = 8, 9
SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}


@dataclass(frozen=True)
class TensorInfo:
    """One row of the tensor table."""

    shape: tuple[int, ...]  # rows first: the file's own order is reversed
    type: GGMLQuantizationType
    start: int  # bytes from the beginning of the file
    nbytes: int


@dataclass(frozen=True)
class GGUFFile:
    """One opened file."""

    path: Path
    metadata: dict[str, Any]  # numeric arrays are numpy arrays
    tensors: dict[str, TensorInfo]
    metadata_end: int  # bytes from the beginning of the file
    pairs: int
    version: int
    data: mmap.mmap

    def raw(self, name: str) -> np.ndarray:
        """u8[..., bytes of a row] as stored."""
        info = self.tensors[name]
        flat = np.frombuffer(self.data, np.uint8, info.nbytes, info.start)
        return flat.reshape(*info.shape[:-1], -1)


def read_gguf(path: Path) -> GGUFFile:
    """Open one file; damage and truncation are one sentence."""
    try:
        with path.open("rb") as stream:
            data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    except ValueError:
        raise CheckpointError(f"`{path}` is empty: download it again") from None
    except OSError as error:
        raise CheckpointError(f"`{path}` cannot be read: {error.strerror}") from None
    if data[:4] != b"GGUF":
        raise CheckpointError(f"`{path}` is not a GGUF file: it does not begin with `GGUF`")
    reader = _Reader(data)
    try:
        return _parse(path, reader)
    except CheckpointError:
        raise
    except (struct.error, ValueError, KeyError, IndexError, OverflowError, MemoryError):
        raise CheckpointError(
            f"`{path}` is damaged or cut off near byte {reader.at} of {len(data)}: "
            "download it again"
        ) from None


def _parse(path: Path, reader: "_Reader") -> GGUFFile:
    reader.at = 4
    version = reader.scalar("I")
    if version not in (2, 3):
        big = " (big-endian files are not supported)" if version & 0xFFFF == 0 else ""
        raise CheckpointError(
            f"`{path}` is GGUF version {version}, known are 2 and 3{big}: convert it again"
        )
    tensor_count, pairs = reader.scalar("Q"), reader.scalar("Q")
    metadata = {}
    for _ in range(pairs):
        key = reader.string()
        metadata[key] = reader.value(reader.scalar("I"))
    metadata_end = reader.at
    table = []
    for _ in range(tensor_count):
        name = reader.string()
        shape = tuple(reader.scalar("Q") for _ in range(reader.scalar("I")))[::-1]
        table.append((name, shape, reader.scalar("I"), reader.scalar("Q")))
    alignment = int(metadata.get("general.alignment", 32))
    base = -(-reader.at // alignment) * alignment
    tensors = {
        name: _place(path, name, shape, kind, base + offset, len(reader.data))
        for name, shape, kind, offset in table
    }
    return GGUFFile(path, metadata, tensors, metadata_end, pairs, version, reader.data)


def _place(
    path: Path, name: str, shape: tuple[int, ...], kind: int, start: int, size: int
) -> TensorInfo:
    try:
        quant = GGMLQuantizationType(kind)
        block, block_bytes = GGML_QUANT_SIZES[quant]
    except (ValueError, KeyError):
        raise CheckpointError(
            f"tensor `{name}` in `{path}` has the unknown type {kind}: is the `gguf` package "
            "older than the file? try pip install --upgrade gguf"
        ) from None
    count = math.prod(shape)
    if not shape or shape[-1] % block:
        raise CheckpointError(
            f"`{path}` is damaged: tensor `{name}` of shape {list(shape)} does not divide into "
            f"blocks of {block}: download it again"
        )
    nbytes = count // block * block_bytes
    if start + nbytes > size:
        raise CheckpointError(
            f"`{path}` is cut off: tensor `{name}` ends at byte {start + nbytes} and the file "
            f"has {size}: download it again"
        )
    return TensorInfo(shape, quant, start, nbytes)


class _Reader:
    """A cursor over the map."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.at = 0

    def scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += struct.calcsize("<" + code)
        return value

    def string(self) -> str:
        return self.strings(1)[0]

    def strings(self, count: int) -> list[str]:
        """`count` strings: the hot loop of a vocabulary."""
        unpack, data, at = struct.Struct("<Q").unpack_from, self.data, self.at
        out = []
        for _ in range(count):
            (length,) = unpack(data, at)
            end = at + 8 + length
            if end > len(data):
                self.at = at
                raise IndexError
            out.append(data[at + 8 : end].decode())
            at = end
        self.at = at
        return out

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            return self.scalar(SCALARS[kind])
        item, count = self.scalar("I"), self.scalar("Q")
        if item == STRING:
            return self.strings(count)
        if item == ARRAY:
            return [self.value(ARRAY) for _ in range(count)]
        dtype = np.dtype("<" + SCALARS[item])
        array = np.frombuffer(self.data, dtype, count, self.at).copy()
        self.at += array.nbytes
        return array
