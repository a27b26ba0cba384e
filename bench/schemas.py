"""The schemas of the JSON-Schema test suite, and some that are meant to be too much.

The suite is not in this repository. The source archive of the package jsonschema holds it:

    pip download --no-deps --no-binary :all: jsonschema && tar xzf jsonschema-*.tar.gz
    octavo bench structured --schemas jsonschema-*/json
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from octavo.engine.config import ConfigError

DRAFTS = ("draft2020-12", "draft7", "draft4")


def suite(folder: str) -> list[tuple[str, dict[str, Any]]]:
    """(name, schema) of every schema that is an object, each once, in the newest draft it is in."""
    root = Path(folder)
    root = root / "tests" if (root / "tests").is_dir() else root
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for draft in DRAFTS:
        for path in sorted((root / draft).rglob("*.json")):
            for group in json.loads(path.read_text()):
                schema = group["schema"]
                if isinstance(schema, dict):
                    plain = {k: v for k, v in schema.items() if k != "$schema"}
                    name = f"{draft}/{path.stem}: {group['description']}"
                    found.setdefault(json.dumps(plain, sort_keys=True), (name, schema))
    if not found:
        raise ConfigError(f"no schemas in {folder}", "--schemas takes the suite's folder")
    return list(found.values())


def nasty() -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, schema): each large, deep, ambiguous or explosive in its own way."""
    yield "enum of 10,000", {"enum": [f"value-{i}" for i in range(10_000)]}
    yield "enum of 100,000", {"enum": [f"value-{i}" for i in range(100_000)]}
    nested: dict[str, Any] = {"type": "string"}
    for _ in range(30):
        nested = {"type": "object", "properties": {"a": nested}, "required": ["a"]}
    yield "30 objects deep", nested
    yield "pattern (a?){1000}a{1000}", _pattern("(a?){1000}(a){1000}")
    yield "pattern [ab]*a[ab]{20}", _pattern("[ab]*a[ab]{20}")
    yield "pattern ((a{1,100}){1,100}){1,100}", _pattern("((a{1,100}){1,100}){1,100}")
    yield "maxLength 1,000,000", {"type": "string", "minLength": 999_999, "maxLength": 1_000_000}
    yield "array of 100,000", {"type": "array", "items": {"type": "integer"}, "minItems": 100_000}
    node = {
        "type": "object",
        "properties": {"l": {"$ref": "#/$defs/n"}, "r": {"$ref": "#/$defs/n"}},
    }
    yield "recursive tree", {"$ref": "#/$defs/n", "$defs": {"n": node}}
    yield "a reference to itself", {"$ref": "#"}
    doubled: dict[str, Any] = {
        f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}, {"$ref": f"#/$defs/d{i + 1}"}]}
        for i in range(22)
    }
    yield "allOf doubled 22 times", {"$ref": "#/$defs/d0", "$defs": doubled | {"d22": {}}}
    yield (
        "16 patterns in allOf",
        {"allOf": [_pattern(f"[a-z]*{c}[a-z]*") for c in "abcdefghijklmnop"]},
    )
    options = [
        {"anyOf": [{"type": "object", "properties": {f"p{i}{j}": {}}} for j in range(4)]}
        for i in range(10)
    ]
    yield "10 anyOf of 4 in allOf", {"allOf": options}
    named: dict[str, Any] = {f"key{i}": {"type": "string"} for i in range(5000)}
    yield "5,000 optional properties", {"type": "object", "properties": named}
    yield (
        "5,000 required properties",
        {
            "type": "object",
            "properties": named,
            "required": list(named),
        },
    )
    numbers = {f"k{i}": {"type": "integer", "multipleOf": 99_991 - 2 * i} for i in range(60)}
    yield "60 numbers with multipleOf", {"type": "object", "properties": numbers}


def _pattern(pattern: str) -> dict[str, Any]:
    return {"type": "string", "pattern": f"^{pattern}$"}
