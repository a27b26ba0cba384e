"""JSON as models write it: read strictly, and written so that every client can read it."""

import json
import re
from typing import Any

_HALF = re.compile("[\ud800-\udfff]")
_DECODER = json.JSONDecoder(parse_constant=lambda word: _refuse(word))
_KINDS: list[tuple[type | tuple[type, ...], tuple[str, ...]]] = [
    (bool, ("boolean",)),
    (int, ("integer", "number")),
    (float, ("number", "integer")),
    (list, ("array",)),
    (dict, ("object",)),
    (type(None), ("null",)),
]


def _refuse(word: str) -> Any:
    raise ValueError(f"{word} is not JSON")


def decode_at(text: str, at: int) -> tuple[Any, int]:
    """The value that begins there and where it ends. ValueError, RecursionError."""
    return _DECODER.raw_decode(text, at)


def decode(text: str) -> Any:
    """One value, white space around it. ValueError, RecursionError."""
    return _DECODER.decode(text)


def encode(value: Any) -> str:
    """JSON text. ValueError for what JSON has not: infinities, and numbers that are none."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    # Half of a pair of surrogates cannot be sent as UTF-8; its escape can.
    return _HALF.sub(lambda half: f"\\u{ord(half[0]):04x}", text)


def encode_object(value: Any) -> str:
    """As `encode`, of an object or of JSON text that is one. ValueError for anything else."""
    if isinstance(value, str):
        value = decode(value)
    if not isinstance(value, dict):
        raise ValueError("arguments are an object")
    return encode(value)


def typed(text: str, schema: Any) -> Any:
    """What unquoted text stands for: its JSON where the schema takes that, else the text itself."""
    kinds = _kinds(schema)
    if kinds == {"string"}:
        return text
    try:
        value = decode(text)
        encode(value)
    except (ValueError, RecursionError):
        words: dict[str, Any] = {"true": True, "false": False, "none": None}
        word = text.strip().lower()
        if word not in words:
            return text
        value = words[word]
    if "string" not in kinds:
        return value
    return value if kinds & _names(value) else text


def _names(value: Any) -> set[str]:
    return set(next((names for kind, names in _KINDS if isinstance(value, kind)), ()))


def _kinds(schema: Any) -> set[str]:
    """The types that a schema names, in its alternatives too; empty where it names none."""
    found: set[str] = set()
    level = [schema]
    for _ in range(4):  # alternatives inside alternatives are rare
        inner: list[Any] = []
        for one in level:
            if not isinstance(one, dict):
                continue
            kind = one.get("type")
            found.update(k for k in (kind if isinstance(kind, list) else [kind]) if type(k) is str)
            if kind is None and isinstance(values := one.get("enum"), list):
                found.update(*(_names(value) or {"string"} for value in values))
            for word in ("anyOf", "oneOf"):
                inner += one[word] if isinstance(one.get(word), list) else []
        level = inner
    return found
