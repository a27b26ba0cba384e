"""Anthropic's messages as a chat body."""

from typing import Any

import msgspec

from octavo.server.conversions.common import (
    call,
    chat_of,
    function_tool,
    objects,
    only_text,
    text_field,
    unknown_part,
)
from octavo.server.protocol.chat import ChatCompletionRequest
from octavo.server.protocol.errors import bad_request
from octavo.server.protocol.messages import MessagesRequest

NAMES = {  # of chat's fields here
    "response_format.json_schema.schema": "output_config.format.schema",
    "response_format": "output_config.format",
    "reasoning_effort": "output_config.effort",
    "stop": "stop_sequences",
}
ROLES = ("user", "assistant", "system")
USER_BLOCKS = ("text", "tool_result")
ASSISTANT_BLOCKS = ("text", "tool_use", "thinking", "redacted_thinking")
CHOICES = {"auto": "auto", "any": "required", "none": "none"}


def to_chat(body: MessagesRequest) -> ChatCompletionRequest:
    """The chat body that asks the same. ApiError 400 names what cannot be served."""
    body.check()
    messages = conversation(body)
    # A last message of the assistant is the beginning of its answer.
    goes_on = messages[-1]["role"] == "assistant" and "tool_calls" not in messages[-1]
    choice = body.tool_choice or {}
    values: dict[str, Any] = {
        "stop": body.stop_sequences or body.stop,
        "tools": [_tool(i, tool) for i, tool in enumerate(body.tools or ())] or None,
        "tool_choice": _choice(choice, bool(body.tools)),
        "chat_template_kwargs": _thinking(body) | (body.chat_template_kwargs or {}),
    }
    if choice.get("disable_parallel_tool_use"):
        values["parallel_tool_calls"] = False
    if goes_on:
        values |= {"continue_final_message": True, "add_generation_prompt": False}
    return chat_of(body, messages, **(values | _output(body)))


def conversation(body: MessagesRequest) -> list[dict[str, Any]]:
    """The messages as chat has them: one role at a time, results of tools on their own."""
    if not body.messages:
        raise bad_request("`messages` must not be empty", "messages")
    messages: list[dict[str, Any]] = []
    if body.system:
        messages.append({"role": "system", "content": _text(body.system, "system")})
    for i, message in enumerate(body.messages):
        where = f"messages[{i}]"
        role = message.get("role")
        if role not in ROLES:
            names = ", ".join(f"`{name}`" for name in ROLES)
            raise bad_request(f"`{where}.role` must be one of {names}, got {role!r}")
        content = message.get("content")
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        blocks = objects(content, f"{where}.content")
        if role == "system":
            made = [{"role": role, "content": _text(blocks, f"{where}.content")}]
        elif role == "user":
            made = _user(blocks, f"{where}.content")
        else:
            made = [_assistant(blocks, f"{where}.content")]
        for one in made:
            _append(messages, one)
    return messages


def _append(messages: list[dict[str, Any]], message: dict[str, Any]) -> None:
    """Turns of one role that follow each other are one turn, as Anthropic has it."""
    last = messages[-1] if messages else {"role": None}
    plain = set(last) == set(message) == {"role", "content"}
    if plain and last["role"] == message["role"]:
        last["content"] += "\n" + message["content"]
    else:
        messages.append(message)


def _text(content: str | list[dict[str, Any]], where: str) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(
        only_text(block, f"{where}[{i}]", ("text",)) for i, block in enumerate(content)
    )


def _user(blocks: list[dict[str, Any]], where: str) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = []
    texts = []
    for i, block in enumerate(blocks):
        here = f"{where}[{i}]"
        if block.get("type") == "tool_result":
            content = block.get("content") or ""
            if not isinstance(content, str):
                content = _text(objects(content, f"{here}.content"), f"{here}.content")
            name = text_field(block, "tool_use_id", here)
            made.append({"role": "tool", "tool_call_id": name, "content": content})
        else:
            texts.append(only_text(block, here, USER_BLOCKS))
    if texts or not made:
        made.append({"role": "user", "content": "\n".join(texts)})
    return made


def _assistant(blocks: list[dict[str, Any]], where: str) -> dict[str, Any]:
    texts, thoughts, calls = [], [], []
    for i, block in enumerate(blocks):
        here = f"{where}[{i}]"
        match block.get("type"):
            case "text":
                texts.append(text_field(block, "text", here))
            case "thinking":
                thoughts.append(text_field(block, "thinking", here))
            case "redacted_thinking":  # of another server: nobody here can read it
                pass
            case "tool_use":
                arguments = block.get("input", {})
                if not isinstance(arguments, dict):
                    raise bad_request(f"`{here}.input` must be an object")
                name = text_field(block, "name", here)
                encoded = msgspec.json.encode(arguments).decode()
                calls.append(call(text_field(block, "id", here), name, encoded))
            case kind:
                raise unknown_part(kind, here, ASSISTANT_BLOCKS)
    made: dict[str, Any] = {"role": "assistant", "content": "\n".join(texts)}
    if thoughts:
        made["reasoning_content"] = "\n".join(thoughts)
    return made | ({"tool_calls": calls} if calls else {})


def _tool(i: int, tool: dict[str, Any]) -> dict[str, Any]:
    where = f"tools[{i}]"
    if tool.get("type") not in (None, "custom"):
        raise bad_request(
            f"`{where}.type` is {tool.get('type')!r}: this server runs no tools itself; "
            "describe your own with `name` and `input_schema`"
        )
    schema = tool.get("input_schema")
    if not isinstance(schema, dict):
        raise bad_request(f"`{where}.input_schema` must be an object")
    name = text_field(tool, "name", where)
    return function_tool(name, tool.get("description"), schema, tool.get("strict"))


def _choice(choice: dict[str, Any], has_tools: bool) -> Any:
    kind = choice.get("type")
    if kind is None:
        return None
    if kind == "tool":
        return {"type": "function", "function": {"name": text_field(choice, "name", "tool_choice")}}
    if kind not in CHOICES:
        raise unknown_part(kind, "tool_choice", (*CHOICES, "tool"))
    return CHOICES[kind] if has_tools or kind != "auto" else None


def _thinking(body: MessagesRequest) -> dict[str, Any]:
    """Off unless asked for, as Anthropic has it. Templates that cannot choose pass over it."""
    if body.thinking is None:
        return {"enable_thinking": False}
    kind, budget = body.thinking.get("type"), body.thinking.get("budget_tokens")
    if kind not in ("enabled", "adaptive", "disabled"):
        raise unknown_part(kind, "thinking", ("enabled", "adaptive", "disabled"))
    if kind == "enabled" and (not isinstance(budget, int) or not 0 < budget < body.max_tokens):
        raise bad_request(
            "`thinking.budget_tokens` must be at least 1 and less than `max_tokens` "
            f"({body.max_tokens}), got {budget!r}"
        )
    return {"enable_thinking": kind != "disabled"}


def _output(body: MessagesRequest) -> dict[str, Any]:
    """`output_config`: how much effort, and which form."""
    config = body.output_config or {}
    values: dict[str, Any] = {}
    if config.get("effort") is not None:
        values["reasoning_effort"] = text_field(config, "effort", "output_config")
    form = config.get("format")
    if form is not None:
        if not isinstance(form, dict) or form.get("type") != "json_schema":
            raise bad_request("`output_config.format.type` must be `json_schema`")
        schema = {"name": "output", "schema": form.get("schema"), "strict": True}
        values["response_format"] = {"type": "json_schema", "json_schema": schema}
    return values
