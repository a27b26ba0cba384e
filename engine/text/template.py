"""Chat templates: messages to the one text that a model was trained on.

The template is the checkpoint's own Jinja text and may come from anywhere, so it runs in Jinja's
sandbox, with the few names that templates of Hugging Face checkpoints expect.
"""

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from octavo.engine.text.tokenizer import Tokenizer


class TemplateError(ValueError):
    """Messages that cannot become a prompt: one sentence."""


class _Generation(Extension):
    """`{% generation %}` marks what a trainer learns from; here its inside is just text."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own escapes for HTML, which no model was trained on."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, "jinja2.ext.loopcontrols"],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


# A template that loops over a message's content wants its parts; others want one string.
_LOOPS_OVER_CONTENT = re.compile(
    r"\{%-?\s*for\s+\w+\s+in\s+\w+(?:\.content|\[['\"]content['\"]\])|\bcontent\s+is\s+iterable"
    r"|\{%-?\s*for\s+\w+\s+in\s+content\b"
)


class ChatTemplate:
    """One compiled template."""

    def __init__(self, source: str, special_tokens: Mapping[str, str] | None = None) -> None:
        self.source = source
        self._special_tokens = dict(special_tokens or {})
        self._wants_parts = bool(_LOOPS_OVER_CONTENT.search(source))
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise TemplateError(
                f"the chat template is not valid Jinja ({error.message}, line {error.lineno})"
            ) from None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        """The prompt's text, special tokens included. Raises TemplateError.

        `continue_final_message` leaves the last message open, so that the model goes on with it.
        """
        if not messages:
            raise TemplateError("`messages` must not be empty")
        if continue_final_message:
            add_generation_prompt = False
        prepared = [self._prepare(message) for message in messages]
        try:
            text = self._template.render(
                **(
                    self._special_tokens
                    | {"tools": tools, "documents": documents}
                    | {"messages": prepared, "add_generation_prompt": add_generation_prompt}
                    | variables
                )
            )
        except (jinja2.TemplateError, TypeError, KeyError, AttributeError, ValueError) as error:
            raise TemplateError(
                f"the chat template refuses these messages: {str(error) or type(error).__name__}"
            ) from None
        return _leave_open(text, prepared[-1]) if continue_final_message else text

    def _prepare(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Content parts of text become one string where the template wants a string."""
        prepared = dict(message)
        content = prepared.get("content")
        if isinstance(content, list) and not self._wants_parts:
            texts = []
            for part in content:
                kind = part.get("type", "text") if isinstance(part, dict) else "text"
                if kind not in ("text", "input_text", "output_text", "refusal"):
                    raise TemplateError(
                        f"a content part of type `{kind}` cannot be read: this model takes text"
                    )
                texts.append(part if isinstance(part, str) else part.get("text", ""))
            prepared["content"] = "\n".join(texts)
        return prepared


def load_template(tokenizer: Tokenizer, chat_template: str | Path | None = None) -> ChatTemplate:
    """The model's own template, or the one in a file or text given. Raises TemplateError."""
    if chat_template:
        return ChatTemplate(_given(chat_template), tokenizer.special_tokens)
    templates = tokenizer.chat_templates
    if not templates:
        raise TemplateError(
            "the model has no chat template; use completions or pass --chat-template"
        )
    source = templates.get("default") or next(iter(templates.values()))
    return ChatTemplate(source, tokenizer.special_tokens)


def _given(chat_template: str | Path) -> str:
    """A template's text; a path is read."""
    text = str(chat_template)
    if "{" in text or "\n" in text:
        return text
    try:
        return Path(text).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TemplateError(f"the chat template `{text}` cannot be read: {error}") from None


def _leave_open(text: str, message: Mapping[str, Any]) -> str:
    """`text` up to the end of the last message's content."""
    content = message.get("content")
    if isinstance(content, list):
        content = next((p["text"] for p in reversed(content) if p.get("text")), None)
    if not isinstance(content, str) or not content.strip():
        raise TemplateError("`continue_final_message` needs text in the last message")
    ending = content.strip()
    at = text.rfind(ending)
    if at < 0:
        raise TemplateError(
            "`continue_final_message` cannot be used: the chat template changes the last message"
        )
    end = at + len(ending)
    tail = content[len(content.rstrip()) :]
    return text[:end] + (tail if text[end:].startswith(tail) else "")
