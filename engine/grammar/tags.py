"""Structural tags as a Lark grammar: free text in which a trigger begins a part with a form.

Two spellings: the older one has `structures` and `triggers`, the newer one a tree under `format` of
const_string, json_schema, regex, grammar, any_text, sequence, or, tag, triggered_tags and
tags_with_separator.
"""

import json
from typing import Any

from octavo.engine.sampling_params import ParameterError


def tag_grammar(value: Any) -> str:
    """The Lark grammar of a structural tag. Raises ParameterError."""
    if not isinstance(value, dict):
        raise _wrong("must be a JSON object")
    if "format" in value:
        return _Tags().whole(value["format"])
    structures, triggers = value.get("structures"), value.get("triggers")
    if not isinstance(structures, list) or not structures or not isinstance(triggers, list):
        raise _wrong("needs `format`, or `structures` and `triggers`, each a list")
    tags = [
        {
            "begin": _text(s, "begin"),
            "content": {"type": "json_schema", "json_schema": _field(s, "schema")},
            "end": _text(s, "end"),
        }
        for s in structures
    ]
    return _Tags().whole({"type": "triggered_tags", "triggers": triggers, "tags": tags})


class _Tags:
    """Collects the rules of one grammar."""

    def __init__(self) -> None:
        self.rules: list[str] = []
        self.terminals = 0

    def whole(self, form: Any) -> str:
        """The grammar whose text is `form`."""
        start = self.rule(self.form(form))
        return "\n".join(["%llguidance {}", f"start: {start}", *self.rules]) + "\n"

    def rule(self, body: str, options: str = "") -> str:
        """A rule of its own for `body`; its name."""
        name = f"part_{len(self.rules)}"
        self.rules.append(f"{name}{options}: {body}")
        return name

    def form(self, form: Any) -> str:
        """What to write in a rule for one form."""
        if not isinstance(form, dict) or not isinstance(form.get("type"), str):
            raise _wrong("`format` must be an object with a `type`, and so must each of its parts")
        make = getattr(self, "_" + form["type"], None)
        if make is None or form["type"] not in _FORMS:
            raise _wrong(f"has no format `{form['type']}`: there are {', '.join(_FORMS)}")
        body: str = make(form)
        return body

    def _const_string(self, form: Any) -> str:
        return _quoted(_text(form, "value"))

    def _json_schema(self, form: Any) -> str:
        schema = _field(form, "json_schema")
        if schema is True:
            schema = {}
        if not isinstance(schema, dict):
            raise _wrong("`json_schema` must be an object")
        return "%json " + json.dumps(schema)

    def _regex(self, form: Any) -> str:
        self.terminals += 1
        name = f"REGEX_{self.terminals}"
        pattern = _text(form, "pattern").replace("/", "\\/")
        self.rules.append(f"{name}: /{pattern}/")
        return name

    def _grammar(self, form: Any) -> str:
        from llguidance.gbnf_to_lark import any_to_lark

        try:
            inner = any_to_lark(_text(form, "grammar"))
        except Exception as error:  # the converter raises many kinds
            raise _wrong(f"`grammar` cannot be read: {error}") from None
        return "%lark {\n" + inner + "\n}"

    def _any_text(self, form: Any) -> str:
        return self.rule("/(.|\\n)*/")

    def _sequence(self, form: Any) -> str:
        return " ".join(self.rule(self.form(part)) for part in _list(form, "elements"))

    def _or(self, form: Any) -> str:
        return " | ".join(self.rule(self.form(part)) for part in _list(form, "elements"))

    def _tag(self, form: Any) -> str:
        return f"{_quoted(_text(form, 'begin'))} {self._content(form)} {self._end(form)}"

    def _content(self, form: Any) -> str:
        content = _field(form, "content")
        if isinstance(content, dict) and content.get("type") == "any_text" and _text(form, "end"):
            return ""  # text up to the end: see _end
        return self.rule(self.form(content))

    def _end(self, form: Any) -> str:
        end, content = _text(form, "end"), _field(form, "content")
        if isinstance(content, dict) and content.get("type") == "any_text" and end:
            return self.rule("/(.|\\n)*/ " + _quoted(end), "[lazy]")
        return _quoted(end)

    def _triggered_tags(self, form: Any) -> str:
        triggers = _list(form, "triggers")
        tags = []
        for tag in _list(form, "tags"):
            begin = _text(tag, "begin")
            trigger = next((t for t in triggers if isinstance(t, str) and begin.startswith(t)), "")
            if not trigger:
                raise _wrong(f"has no trigger that `begin` {begin!r} starts with")
            rest = _quoted(begin[len(trigger) :])
            head = self.rule("TEXT " + _quoted(trigger), "[lazy]")
            tags.append(self.rule(f"{head} {rest} {self._content(tag)} {self._end(tag)}"))
        self._text_terminal()
        choice = "(" + " | ".join(tags) + ")"
        first = form.get("at_least_one")
        only = bool(form.get("stop_after_first"))
        many = choice if only and first else choice + ("?" if only else "+" if first else "*")
        return many if only and first else many + " tail"

    def _tags_with_separator(self, form: Any) -> str:
        tag = self.rule(" | ".join(self.rule(self._tag(tag)) for tag in _list(form, "tags")))
        more = f"({_quoted(_text(form, 'separator'))} {tag})*"
        if form.get("stop_after_first"):
            more = ""
        return f"{tag} {more}" if form.get("at_least_one") else f"({tag} {more})?"

    def _text_terminal(self) -> None:
        if "TEXT: /(.|\\n)*/" not in self.rules:
            self.rules += ["tail: TEXT", "TEXT: /(.|\\n)*/"]


_FORMS = (
    *("const_string", "json_schema", "regex", "grammar", "any_text", "sequence", "or", "tag"),
    *("triggered_tags", "tags_with_separator"),
)


def _quoted(text: str) -> str:
    return json.dumps(text) if text else ""


def _field(value: Any, name: str) -> Any:
    if not isinstance(value, dict) or name not in value:
        raise _wrong(f"needs `{name}` in every part that is like {str(value)[:60]}")
    return value[name]


def _text(value: Any, name: str) -> str:
    text = _field(value, name)
    if not isinstance(text, str):
        raise _wrong(f"`{name}` must be a text, got {text!r:.60}")
    return text


def _list(value: Any, name: str) -> list[Any]:
    items = _field(value, name)
    if not isinstance(items, list) or not items:
        raise _wrong(f"`{name}` must be a list that is not empty")
    return items


def _wrong(problem: str) -> ParameterError:
    return ParameterError("structured_outputs", f"structural_tag {problem}")
