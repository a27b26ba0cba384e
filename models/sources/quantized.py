"""Quantized safetensors: a weight that is kept in fewer bits comes as float32 when it is asked for.

Scales of activations are left out: a weight is read as exactly as it was written, and what it is
multiplied with stays as it is.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from octavo.models.sources.base import CheckpointError, Tensors
from octavo.models.sources.dequantize import Module, Reader, Scheme, Stored, reader_of

METHODS = (
    "fp8",
    "compressed-tensors",
    "gptq",
    "awq",
    "bitsandbytes",
    "modelopt",
    "fbgemm_fp8",
)
FORMS = ("gptq", "gptq_v2", "gemm")  # of GPTQ and AWQ
PACKED = (  # of compressed-tensors
    "dense",
    "naive-quantized",
    "int-quantized",
    "float-quantized",
    "pack-quantized",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
    "mxfp8-quantized",
    "mixed-precision",
)
# The tensors that one projection may have beside its bias.
_PART = re.compile(
    r"(?P<module>.+?)\.(?P<part>qweight|qzeros|scales|g_idx|SCB|weight|weight_\w+"
    r"|weight\.(?:(?:nested_)?absmax|(?:nested_)?quant_map|quant_state\.\w+)"
    r"|(?:input|activation|output)_(?:global_)?(?:scale|zero_point)(?:_ub)?)$"
)


def undo(stored: Stored, config: Mapping[str, Any]) -> tuple[Tensors, str]:
    """Tensors with whole weights, and how they are stored; "" where they are whole as they lie.

    `config` is a `quantization_config`. Raises CheckpointError for what cannot be read.
    """
    scheme = read_scheme(config)
    return (stored, "") if scheme is None else (Dequantized(stored, scheme), scheme.method)


def read_scheme(config: Mapping[str, Any]) -> Scheme | None:
    """From a `quantization_config`; None where weights are whole.

    Raises CheckpointError for what cannot be read.
    """
    if not config or (config.get("kv_cache_scheme") and not config.get("config_groups")):
        return None  # a scheme of the cache alone brings only scales
    method = str(config.get("quant_method") or "unnamed")
    if method not in METHODS:
        raise _unreadable(f"the checkpoint is quantized with {method!r}", f"not {_some(METHODS)}")
    form = str(config.get("checkpoint_format") or config.get("version") or FORMS[0]).lower()
    if method in ("gptq", "awq") and form not in FORMS:
        raise _unreadable(f"the checkpoint is {method} in the form {form!r}", f"not {_some(FORMS)}")
    block = config.get("weight_block_size")
    if method == "compressed-tensors":
        block = _block(config)
    rows_columns = (int(block[0]), int(block[1])) if block else None
    return Scheme(method, rows_columns, one_less=method == "gptq" and form != "gptq_v2")


def _block(config: Mapping[str, Any]) -> Any:
    """The block of compressed-tensors' groups, one for all. Raises CheckpointError."""
    groups = (config.get("config_groups") or {}).values()
    sparse = (config.get("sparsity_config") or {}).get("format")
    for form in (sparse, config.get("format"), *(group.get("format") for group in groups)):
        if form and form not in PACKED:
            raise _unreadable(f"the checkpoint is packed as {form!r}", f"not {_some(PACKED)}")
    if config.get("transform_config"):
        raise _unreadable("the checkpoint's weights are rotated", "transform_config")
    blocks = [(group.get("weights") or {}).get("block_structure") for group in groups]
    found = [block for block in blocks if block]
    if any(block != found[0] for block in found):
        raise _unreadable("the checkpoint shares scales in blocks of several sizes", str(found))
    return found[0] if found else None


def _unreadable(what: str, why: str) -> CheckpointError:
    return CheckpointError(
        f"{what}, which cannot be read ({why}): take the unquantized checkpoint or a GGUF file"
    )


def _some(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"


class Dequantized:
    """The tensors of a quantized checkpoint, with whole weights."""

    def __init__(self, stored: Stored, scheme: Scheme) -> None:
        self._stored, self._scheme = stored, scheme
        parts: dict[str, set[str]] = {}
        self._plain = []
        for name in stored.names():
            if match := _PART.fullmatch(name):
                parts.setdefault(match["module"], set()).add(match["part"])
            else:
                self._plain.append(name)
        self._readers: dict[str, tuple[Module, Reader]] = {}
        for name, has in parts.items():
            module = Module(stored, name, frozenset(has))
            if reader := reader_of(module, scheme):
                self._readers[f"{name}.weight"] = module, reader
            elif "weight" in has:
                self._plain.append(_whole(stored, f"{name}.weight"))

    def names(self) -> list[str]:
        return [*(name for name in self._plain if not self._padding(name)), *self._readers]

    def shape(self, name: str) -> tuple[int, ...]:
        return self.get(name).shape if name in self._readers else self._stored.shape(name)

    def get(self, name: str) -> np.ndarray:
        if name not in self._readers:
            return self._stored.get(name)
        module, reader = self._readers[name]
        try:
            return reader(module, self._scheme)
        except (ValueError, IndexError, KeyError) as error:
            raise CheckpointError(
                f"`{name}` is not what {self._scheme.method} calls for ({error}): is the "
                "checkpoint's config.json its own?"
            ) from None

    @property
    def nbytes(self) -> int:
        return self._stored.nbytes

    def close(self) -> None:
        self._stored.close()

    def _padding(self, name: str) -> bool:
        """GPTQ's tools write a bias of zeros where the model has none."""
        module = name.removesuffix("bias") + "weight"
        if self._scheme.method != "gptq" or module not in self._readers or module == name:
            return False
        return not self._stored.get(name).any()


def _whole(stored: Stored, name: str) -> str:
    """The name of a weight that is no quantized one. Raises CheckpointError where it must be."""
    if stored.dtype(name).kind in "iu":
        raise CheckpointError(
            f"tensor `{name}` holds whole numbers and no scale is beside it: download it again"
        )
    return name
