"""What on a GPU is decided by measurement, in one record, and how to decide otherwise.

The defaults are what was measured to be the fastest (bench/gpu-notes.md). The environment variable
OCTAVO_GPU overrides them for a measurement, by names and values with commas between:

    OCTAVO_GPU="cublas_from=1000000,tile=32,xla_gpu_autotune_level=4"
"""

from dataclasses import dataclass, fields, replace
from typing import Any

from octavo.backends.record import BackendError
from octavo.pallas_kernels.attention.gpu import Tuning

VARIABLE = "OCTAVO_GPU"
Value = bool | int | str


@dataclass(frozen=True)
class Choices:
    """What a backend for GPUs is made with."""

    # Tokens from which XLA's own matrix products are behind cuBLAS's, and cost longer to compile.
    cublas_from: int = 128
    # Decode rows up to which queries and keys are normed and turned inside the decode kernel.
    packed: int = 128
    # Tokens from which gate and up projection and their activation are one kernel.
    gated_from: int = 64
    # Tokens up to which a large product of a long depth is two of half of it, and their sum.
    halved: int = 256
    tuning: Tuning = Tuning()
    xla: tuple[tuple[str, Value], ...] = ()  # options of XLA, for every program


def read(text: str) -> Choices:
    """The choices that `text` asks for. Raises BackendError for names that do not exist."""
    choices = Choices()
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, _, value = item.partition("=")
        choices = _with(choices, name.strip(), value.strip() or "1")
    return choices


def _with(choices: Choices, name: str, value: str) -> Choices:
    if name.startswith("xla_"):
        return replace(choices, xla=(*choices.xla, (name, _value(value))))
    tuning = choices.tuning
    known = ["cublas_from", "packed", "gated_from", "halved"]
    if name in known:
        given: dict[str, Any] = {name: _number(name, value)}
        return replace(choices, **given)
    for part in fields(Tuning):
        record = getattr(tuning, part.name)
        if name in (names := _names(type(record))):
            changed = replace(record, **{name: _like(record, name, value)})
            return replace(choices, tuning=replace(tuning, **{part.name: changed}))
        known += names
    raise BackendError(
        f"{VARIABLE} names `{name}`; there are {', '.join(dict.fromkeys(known))} and xla_..."
    )


def _names(record: type) -> list[str]:
    """`tile` is of the decode kernel."""
    return [field.name for field in fields(record)]


def _like(record: object, name: str, value: str) -> int:
    """A value of the kind that the field has."""
    number = _number(name, value)
    return bool(number) if isinstance(getattr(record, name), bool) else number


def _number(name: str, value: str) -> int:
    try:
        return int(value)
    except ValueError:
        raise BackendError(f"{VARIABLE}: `{name}` takes a whole number, got `{value}`") from None


def _value(value: str) -> Value:
    if value in ("true", "false"):
        return value == "true"
    return int(value) if value.lstrip("-").isdigit() else value
