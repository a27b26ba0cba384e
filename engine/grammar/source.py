"""What a request asks for as one grammar text: a Lark grammar, or llguidance's own JSON.

Nothing here compiles anything, so all of it is quick; `problem` looks at what would make it slow
before any of it is done.
"""

import json
from typing import Any

from llguidance import LLMatcher, regex_to_lark
from llguidance.gbnf_to_lark import any_to_lark

from octavo.engine.grammar.tags import tag_grammar
from octavo.engine.sampling_params import ParameterError, StructuredOutputsParams

FIELD = "structured_outputs"
MAX_DEPTH = 64  # objects and lists inside each other
MAX_CHARACTERS = 1 << 20  # of a schema or grammar


def grammar_text(params: StructuredOutputsParams) -> str:
    """The text that `compile_grammar` takes. Raises ParameterError."""
    check_size(params)
    if params.json is not None:
        return _json(_schema(params.json), params)
    if params.json_object:
        return _json({"type": "object"}, params)
    if params.choice is not None:
        return "start: " + " | ".join(json.dumps(choice) for choice in params.choice)
    if params.structural_tag is not None:
        return tag_grammar(_parsed("structural_tag", params.structural_tag))
    if params.regex is not None:
        # \d and \w are ASCII, as in JavaScript and in the patterns of a schema.
        return f"start: /{regex_to_lark(params.regex, 'dw')}/"
    assert params.grammar is not None, f"{params=}"
    try:
        return any_to_lark(params.grammar)  # EBNF as in `root ::= "a" | "b"` becomes Lark
    except Exception as error:  # the converter raises many kinds
        raise wrong("grammar", f"cannot be read: {first_line(str(error))}") from None


def check_size(params: StructuredOutputsParams) -> None:
    """ParameterError where it is too large or too deep to be looked at; at once, for anything."""
    for kind in ("json", "regex", "grammar", "structural_tag", "whitespace_pattern"):
        value = getattr(params, kind)
        if isinstance(value, str) and len(value) > MAX_CHARACTERS:
            raise wrong(kind, f"takes at most {MAX_CHARACTERS:,} characters, got {len(value):,}")
    for choice in params.choice or ():
        if not isinstance(choice, str) or not choice:
            raise wrong("choice", f"must be a list of texts that are not empty, got {choice!r}")
    if sum(map(len, params.choice or ())) > MAX_CHARACTERS:
        raise wrong("choice", f"takes at most {MAX_CHARACTERS:,} characters in all")
    if isinstance(params.json, dict):
        _check_depth("json", params.json)


def wrong(kind: str, problem: str) -> ParameterError:
    """The error about one of the kinds of structured output."""
    return ParameterError(FIELD, f"{kind} {problem}")


def first_line(text: str) -> str:
    """The first line of a message, and its last where that names the error; short."""
    lines = text.strip().split("\n")
    named = [line.strip() for line in lines[1:] if line.startswith("error: ")]
    line = " ".join([lines[0].removesuffix(" regex parse error:"), *named[-1:]])
    return line if len(line) <= 300 else line[:297] + "..."


def _schema(given: str | dict[str, Any]) -> dict[str, Any]:
    schema = _parsed("json", given) if isinstance(given, str) else given
    if schema is True:
        return {}
    if not isinstance(schema, dict):
        raise wrong("json", f"must be a JSON schema, which is an object, got {schema!r:.60}")
    return schema


def _parsed(kind: str, text: str) -> Any:
    try:
        value = json.loads(text)
    except RecursionError:
        raise wrong(kind, f"may nest at most {MAX_DEPTH} levels deep") from None
    except ValueError as error:
        raise wrong(kind, f"is not JSON: {error}") from None
    _check_depth(kind, value)
    return value


def _check_depth(kind: str, value: Any) -> None:
    level, depth = [value], 0
    while level:
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        depth += bool(level)
        if depth > MAX_DEPTH:
            raise wrong(kind, f"may nest at most {MAX_DEPTH} levels deep, and is deeper")


def _json(schema: dict[str, Any], params: StructuredOutputsParams) -> str:
    if params.disable_additional_properties:
        schema = _closed(schema)
    options: dict[str, Any] = {"whitespace_flexible": not params.disable_any_whitespace}
    if params.whitespace_pattern is not None:
        options["whitespace_pattern"] = params.whitespace_pattern
    try:
        text = json.dumps(schema)
        if len(text) > MAX_CHARACTERS:
            raise wrong("json", f"takes at most {MAX_CHARACTERS:,} characters, got {len(text):,}")
        return LLMatcher.grammar_from_json_schema(text, overrides=options)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        if isinstance(error, ParameterError):
            raise
        raise wrong("json", f"cannot be read: {first_line(str(error))}") from None


def _closed(schema: Any) -> Any:
    """A copy in which an object takes only the properties that are named."""
    if isinstance(schema, list):
        return [_closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    out = {key: _closed(value) for key, value in schema.items()}
    named = isinstance(schema.get("properties"), dict) or "patternProperties" in schema
    if named and not {"additionalProperties", "unevaluatedProperties"} & schema.keys():
        out["additionalProperties"] = False
    return out
