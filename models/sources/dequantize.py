"""How weights of fewer bits become float32, one function for each way in which a tool stores them.

What a module holds says which it is; weights are [out, in], N by M:

    weight, weight_scale[_inv]      8-bit floats or whole numbers: fp8, compressed-tensors, modelopt
    weight_packed, weight_scale     whole numbers of up to 8 bits in int32, or 4-bit floats in bytes
    weight, weight_scale_2          4-bit floats in bytes: modelopt
    qweight, qzeros, scales         GPTQ and AWQ
    weight, weight.absmax           bitsandbytes in 4 bits; weight, SCB: in 8

Numbers are cut and joined by numpy, in runs that stay in the cache: 0.5 to 1.5 billion weights a
second of one core.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from octavo.models.sources.base import CHUNK, Tensors

FLOAT4 = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
AWQ_PLACE = (0, 4, 1, 5, 2, 6, 3, 7)  # where a column's four bits lie among the eight of a word


class Stored(Tensors, Protocol):
    """Tensors as they lie in files."""

    def dtype(self, name: str) -> np.dtype[Any]: ...


@dataclass(frozen=True)
class Scheme:
    """What `quantization_config` says that tensors do not."""

    method: str
    block: tuple[int, int] | None = None  # rows and columns that share a scale
    one_less: bool = False  # zero points of GPTQ are stored less one


class Module:
    """The tensors of one projection, by what comes after its name."""

    def __init__(self, stored: Stored, name: str, parts: frozenset[str]) -> None:
        self.stored, self.name, self.parts = stored, name, parts

    def __contains__(self, part: str) -> bool:
        return part in self.parts

    def __getitem__(self, part: str) -> np.ndarray:
        return self.stored.get(f"{self.name}.{part}")

    def floats(self, part: str) -> np.ndarray:
        """As float32; bytes are powers of two (E8M0, as the MX formats have them)."""
        array = self[part]
        if array.dtype == np.uint8:
            array = array.view(ml_dtypes.float8_e8m0fnu)
        if array.dtype.itemsize > 1 or array.dtype == np.int8:
            return array.astype(np.float32)
        table = np.arange(256, dtype=np.uint8).view(array.dtype).astype(np.float32)
        return table[array.view(np.uint8)]  # three times as fast as a cast


Reader = Callable[[Module, Scheme], np.ndarray]


def reader_of(module: Module, scheme: Scheme) -> Reader | None:
    """What makes this module's weight; None where it is whole."""
    if "qweight" in module:
        return _awq if scheme.method == "awq" else _gptq
    if "weight_packed" in module:
        whole = module.stored.dtype(f"{module.name}.weight_packed") == np.int32
        return _packed if whole else _float4
    for part, reader in (
        ("weight.absmax", _table),
        ("SCB", _rows_of_127),
        ("weight_scale_2", _float4),
        ("weight_scale", _scaled),
        ("weight_scale_inv", _scaled),
    ):
        if part in module:
            return reader
    return None


def unpacked(stored: np.ndarray, bits: int, count: int) -> np.ndarray:
    """u8[..., count] from words [..., n] of any width: `bits` bits each, the lowest first."""
    raw = np.ascontiguousarray(stored).view(np.uint8)
    if 8 % bits == 0:
        values = np.empty((*raw.shape, 8 // bits), np.uint8)
        for i in range(8 // bits):  # one long loop each: an axis of two is slow
            np.bitwise_and(raw >> np.uint8(bits * i), np.uint8(2**bits - 1), out=values[..., i])
    else:
        single = np.unpackbits(raw, axis=-1, bitorder="little")
        single = single[..., : single.shape[-1] // bits * bits]
        values = np.packbits(single.reshape(*raw.shape[:-1], -1, bits), axis=-1, bitorder="little")
    return values.reshape(*raw.shape[:-1], -1)[..., :count]


def apply(
    operation: Callable[..., Any],
    values: np.ndarray,
    numbers: np.ndarray,
    block: tuple[int, int] | None = None,
) -> None:
    """values = operation(values, numbers), in place; values f32[N, M].

    `numbers` has one for all, for a row [N] or [N, 1], for a group of a row's columns [N, groups],
    or for a block of rows and columns, whose last ones may be cut. Raises ValueError for others.
    """
    N, M = values.shape
    if numbers.size == 1:
        operation(values, numbers.reshape(()), out=values)
        return
    numbers = numbers.reshape(len(numbers), -1)
    if block is not None and numbers.shape == (-(-N // block[0]), -(-M // block[1])):
        numbers = np.repeat(numbers, block[0], axis=0)[:N]
        if M % block[1]:
            numbers = np.repeat(numbers, block[1], axis=1)[:, :M]
    if len(numbers) != N or M % numbers.shape[1]:
        raise ValueError(f"a weight of {[N, M]} has scales of {list(numbers.shape)}")
    groups = values.reshape(N, numbers.shape[1], -1)
    operation(groups, numbers[:, :, None], out=groups)


def _scaled(module: Module, scheme: Scheme) -> np.ndarray:
    values = module.floats("weight")
    if "weight_zero_point" in module:
        zeros = module["weight_zero_point"].astype(np.float32)
        apply(np.subtract, values, zeros, scheme.block)
    part = "weight_scale_inv" if "weight_scale_inv" in module else "weight_scale"
    apply(np.multiply, values, module.floats(part), scheme.block)
    return values


def _packed(module: Module, scheme: Scheme) -> np.ndarray:
    """compressed-tensors' pack-quantized: 32 numbers in as many words as they have bits."""
    words = module["weight_packed"]
    N, M = (int(n) for n in module["weight_shape"])
    bits = words.shape[1] * 32 // M
    scales = module.floats("weight_scale")
    zeros = np.full_like(scales, 2 ** (bits - 1))
    if "weight_zero_point" in module:  # packed along the rows
        zeros = unpacked(module["weight_zero_point"].T, bits, N).T.astype(np.float32)
    groups = module["weight_g_idx"] if "weight_g_idx" in module else None
    return _grouped(unpacked(words, bits, M), zeros, scales, groups)


def _grouped(
    values: np.ndarray, zeros: np.ndarray, scales: np.ndarray, groups: np.ndarray | None
) -> np.ndarray:
    """(values - zeros) * scales; values u8[N, M], the others f32[N, groups], groups i32[M]."""
    if groups is not None and (groups < 0).any():
        groups = None  # never filled in
    if groups is not None:
        size = -(-len(groups) // scales.shape[1])
        if (groups == np.arange(len(groups)) // size).all():
            groups = None  # columns are in their order
    if groups is not None:
        zeros, scales = zeros[:, groups], scales[:, groups]
    floats = np.empty(values.shape, np.float32)
    step = max(1, CHUNK // values.shape[1])
    for rows in (slice(at, at + step) for at in range(0, len(values), step)):
        floats[rows] = values[rows]
        apply(np.subtract, floats[rows], zeros[rows])
        apply(np.multiply, floats[rows], scales[rows])
    return floats


def _gptq(module: Module, scheme: Scheme) -> np.ndarray:
    """qweight i32[M * bits / 32, N], qzeros i32[groups, N * bits / 32], scales [groups, N]."""
    words, scales, groups = module["qweight"], module.floats("scales"), module["g_idx"]
    M, N = len(groups), words.shape[1]
    bits = len(words) * 32 // M
    zeros = module["qzeros"]
    if scheme.one_less and 32 % bits == 0:  # word by word, as it was taken away
        ones = sum(1 << shift for shift in range(0, 32, bits))
        zeros = zeros.view(np.uint32) + np.uint32(ones)
    zeros = unpacked(zeros, bits, N)
    if scheme.one_less and 32 % bits:
        zeros = (zeros + np.uint8(1)) & np.uint8(2**bits - 1)
    values = unpacked(words.T, bits, M)
    return _grouped(values, zeros.T.astype(np.float32), np.ascontiguousarray(scales.T), groups)


def _awq(module: Module, scheme: Scheme) -> np.ndarray:
    """qweight i32[M, N / 8], qzeros i32[groups, N / 8], scales [groups, N]."""

    def numbers(words: np.ndarray) -> np.ndarray:
        """u8[N, rows] of words [rows, N / 8]."""
        turned = np.ascontiguousarray(words.T).view(np.uint32)
        values = np.empty((len(turned), 8, len(words)), np.uint8)
        for column, place in enumerate(AWQ_PLACE):
            values[:, column] = (turned >> np.uint32(4 * place)) & np.uint32(15)
        return values.reshape(-1, len(words))

    zeros = numbers(module["qzeros"]).astype(np.float32)
    scales = np.ascontiguousarray(module.floats("scales").T)
    return _grouped(numbers(module["qweight"]), zeros, scales, None)


def _float4(module: Module, scheme: Scheme) -> np.ndarray:
    """NVFP4 and MXFP4: two numbers a byte, a scale for 16 or 32 of them, and one for all."""
    raw = module["weight_packed" if "weight_packed" in module else "weight"]
    values = FLOAT4[unpacked(raw, 4, 2 * raw.shape[1])]
    scales = module.floats("weight_scale")
    if "weight_global_scale" in module:
        scales = scales / module.floats("weight_global_scale")
    if "weight_scale_2" in module:
        scales = scales * module.floats("weight_scale_2")
    apply(np.multiply, values, scales)
    return values


def _table(module: Module, scheme: Scheme) -> np.ndarray:
    """bitsandbytes NF4 and FP4: a table, a largest value a block, which may be quantized too."""
    (part,) = (part for part in module.parts if part.startswith("weight.quant_state."))
    state = json.loads(module[part].tobytes())
    raw = module["weight"].reshape(-1).view(np.uint8)
    places = np.stack([raw >> 4, raw & 15], axis=-1).reshape(-1)  # the upper half comes first
    largest = module["weight.absmax"]
    if "weight.nested_absmax" in module:
        outer = module["weight.nested_absmax"]
        inner = module["weight.nested_quant_map"][largest]
        repeated = np.repeat(outer, state["nested_blocksize"])[: len(inner)]
        largest = inner * repeated + np.float32(state["nested_offset"])
    values = module["weight.quant_map"][places]
    values = values * np.repeat(largest, state["blocksize"])[: len(values)]
    return values.astype(np.float32).reshape(state["shape"])


def _rows_of_127(module: Module, scheme: Scheme) -> np.ndarray:
    """bitsandbytes' LLM.int8(): 127 is the largest value of the row, SCB."""
    values = module.floats("weight")
    apply(np.multiply, values, module.floats("SCB") / 127)
    return values
