"""Parsers by name, the names of vLLM, and the choice for a model that nobody named one for."""

import uuid
from collections.abc import Callable
from dataclasses import dataclass

from octavo.server.parsers.bare import llama3_json, mistral, pythonic
from octavo.server.parsers.events import Parser, Plain
from octavo.server.parsers.reasoning import Thinking, closes, leaves_open
from octavo.server.parsers.tagged import Schemas, Tagged, read_json_calls, xml_reader

AUTO, NONE = "auto", "none"


def long_id() -> str:
    """The name of a call."""
    return f"call_{uuid.uuid4().hex}"


def short_id() -> str:
    """Nine letters or digits: chat templates of Mistral refuse any other earlier call."""
    return uuid.uuid4().hex[:9]


@dataclass(frozen=True)
class ToolFormat:
    """How a model writes its calls."""

    make: Callable[[Schemas], Parser]
    special: bool  # its marks are special tokens, which a text leaves out unless told otherwise
    new_id: Callable[[], str] = long_id


TOOL_FORMATS = {
    "hermes": ToolFormat(lambda _: Tagged(read_json_calls), special=False),
    "qwen3_xml": ToolFormat(lambda schemas: Tagged(xml_reader(schemas)), special=False),
    "llama3_json": ToolFormat(lambda _: llama3_json(), special=True),
    "mistral": ToolFormat(lambda _: mistral(), special=True, new_id=short_id),
    "pythonic": ToolFormat(lambda _: pythonic(), special=False),
    "openai": ToolFormat(lambda _: Plain(), special=True),  # its calls are read with its thoughts
}
TOOL_ALIASES = {
    "qwen3_json": "hermes",
    "qwen3_coder": "qwen3_xml",
    "qwen3": "qwen3_xml",
    "llama4_json": "llama3_json",
    "llama4_pythonic": "pythonic",
}
REASONING = ("qwen3", "deepseek_r1", "openai_gptoss")
REASONING_ALIASES = {"gpt_oss": "openai_gptoss", "deepseek_v3": "deepseek_r1"}


def tool_format(name: str, template: str) -> str:
    """The format's own name; "" is none. `template` is the chat template, for "auto"."""
    if name == NONE:
        return ""
    if name != AUTO:
        return TOOL_ALIASES.get(name, name)
    for mark, found in (
        ("<|channel|>", "openai"),
        ("<function=", "qwen3_xml"),
        ("<tool_call>", "hermes"),
        ("[TOOL_CALLS]", "mistral"),
        ("<|python_tag|>", "llama3_json"),
        ('"parameters": dictionary', "llama3_json"),
        ("[func_name1(", "pythonic"),
    ):
        if mark in template:
            return found
    return "hermes"  # what a template that knows no tools is told to write


def reasoning_format(name: str, template: str) -> str:
    """The format's own name; "" is none."""
    if name == NONE:
        return ""
    if name != AUTO:
        return REASONING_ALIASES.get(name, name)
    if "<|channel|>" in template:
        return "openai_gptoss"
    return "qwen3" if "</think>" in template else ""


def thinking(name: str, prompt: str) -> Thinking | None:
    """The parser of thoughts for this prompt; None where none are wanted."""
    if name not in ("qwen3", "deepseek_r1") or closes(prompt):
        return None
    return Thinking(inside=name == "deepseek_r1" or leaves_open(prompt))


def names() -> tuple[list[str], list[str]]:
    """What --tool-call-parser and --reasoning-parser take."""
    tools = [AUTO, NONE, *TOOL_FORMATS, *TOOL_ALIASES]
    return tools, [AUTO, NONE, *REASONING, *REASONING_ALIASES]
