"""Items of /v1/responses as a chat body, and as the items that a client gets back."""

import uuid
from typing import Any

from octavo.engine.sampling_params import default_fields
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
from octavo.server.protocol.errors import bad_request, not_yet
from octavo.server.protocol.responses import (
    Reasoning,
    ResponseObject,
    ResponsesRequest,
    TextConfig,
)

Item = dict[str, Any]
ROLES = ("user", "assistant", "system", "developer")
KINDS = ("message", "function_call", "function_call_output", "reasoning")
TEXTS = ("input_text", "output_text", "text")
NAMES = {  # of chat's fields here
    "response_format.json_schema.schema": "text.format.schema",
    "response_format": "text.format",
    "max_completion_tokens": "max_output_tokens",
    "max_tokens": "max_output_tokens",
    "messages": "input",
}
FORMATS = ("text", "json_object", "json_schema")
PREFIXES = {"function_call": "fc", "function_call_output": "fco", "reasoning": "rs"}


def items_of(body: ResponsesRequest) -> list[Item]:
    """`input` as items with their ids. ApiError 400 for those that cannot be read."""
    given = body.input
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    if not given:
        raise bad_request("`input` must not be empty", "input")
    return [_item(item, f"input[{i}]") for i, item in enumerate(given)]


def _item(item: Item, where: str) -> Item:
    kind = item.get("type") or ("message" if "role" in item else None)
    if kind == "item_reference":
        raise not_yet(where, "it is an `item_reference`: send the item itself")
    if kind not in KINDS:
        raise unknown_part(kind, where, KINDS)
    made = {**item, "type": kind, "status": item.get("status") or "completed"}
    made["id"] = item.get("id") or new_id(PREFIXES.get(kind, "msg"))
    if kind == "message":
        if item.get("role") not in ROLES:
            names = ", ".join(f"`{name}`" for name in ROLES)
            raise bad_request(f"`{where}.role` must be one of {names}, got {item.get('role')!r}")
        made["content"] = _parts(item.get("content"), item["role"], f"{where}.content")
    elif kind == "reasoning":
        made.setdefault("summary", [])
        _thought(made, where)
    else:
        fields = ("call_id", "name", "arguments") if kind == "function_call" else ("call_id",)
        for field in fields:
            text_field(item, field, where)
        if kind == "function_call_output":
            _result(made, where)
    return made


def _parts(content: Any, role: str, where: str) -> list[dict[str, Any]]:
    """The parts of a message, as the clients know them."""
    said = role == "assistant"
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    parts = []
    for i, part in enumerate(objects(content, where)):
        if said and part.get("type") == "refusal":
            parts.append({**part, "refusal": text_field(part, "refusal", f"{where}[{i}]")})
            continue
        text = only_text(part, f"{where}[{i}]", TEXTS)
        if said:
            extra = {"annotations": part.get("annotations") or [], "logprobs": []}
            parts.append({"type": "output_text", "text": text, **extra})
        else:
            parts.append({"type": "input_text", "text": text})
    return parts


def _thought(item: Item, where: str) -> str:
    content = objects(item.get("content") or item.get("summary") or [], f"{where}.content")
    return "\n".join(
        text_field(part, "text", f"{where}.content[{i}]") for i, part in enumerate(content)
    )


def _result(item: Item, where: str) -> str:
    output = item.get("output")
    if isinstance(output, str):
        return output
    parts = objects(output, f"{where}.output")
    return "\n".join(only_text(p, f"{where}.output[{i}]", TEXTS) for i, p in enumerate(parts))


def messages_of(items: list[Item], instructions: str | None) -> list[dict[str, Any]]:
    """The conversation as chat has it. What the model said in one turn is one message."""
    messages: list[dict[str, Any]] = []
    if instructions:
        messages.append({"role": "system", "content": instructions})
    for i, item in enumerate(items):
        kind, turn = item["type"], messages[-1] if messages else None
        if turn is not None and turn["role"] != "assistant":
            turn = None
        if kind == "function_call_output":
            result = _result(item, f"input[{i}]")
            messages.append({"role": "tool", "tool_call_id": item["call_id"], "content": result})
        elif kind == "message" and item["role"] != "assistant":
            _append(messages, item)
        elif kind == "reasoning":
            thought = {"reasoning_content": _thought(item, f"input[{i}]")}
            messages.append({"role": "assistant", "content": ""} | thought)
        elif kind == "message":
            if turn is None or turn["content"] or "tool_calls" in turn:
                turn = {"role": "assistant", "content": ""}
                messages.append(turn)
            turn["content"] = _said(item)
        else:
            if turn is None:
                turn = {"role": "assistant", "content": ""}
                messages.append(turn)
            made = call(item["call_id"], item["name"], item["arguments"])
            turn.setdefault("tool_calls", []).append(made)
    return messages


def _said(item: Item) -> str:
    return "\n".join(part.get("text") or part.get("refusal") or "" for part in item["content"])


def _append(messages: list[dict[str, Any]], item: Item) -> None:
    """Instructions at the beginning are one message: templates take no more than one."""
    role = "system" if item["role"] == "developer" else item["role"]
    text = _said(item)
    if role == "system" and len(messages) == 1 and messages[0]["role"] == "system":
        messages[0]["content"] += "\n" + text
    else:
        messages.append({"role": role, "content": text})


def to_chat(body: ResponsesRequest, items: list[Item]) -> ChatCompletionRequest:
    """The chat body that asks the same of `items`, the whole conversation."""
    body.check()
    reasoning = body.reasoning or Reasoning()
    tools = [_tool(i, tool) for i, tool in enumerate(body.tools or ())]
    values: dict[str, Any] = {
        "max_completion_tokens": body.max_output_tokens,
        "logprobs": body.wants_logprobs or None,
        "top_logprobs": (body.top_logprobs or 0) if body.wants_logprobs else None,
        "tools": tools or None,
        "tool_choice": _choice(body.tool_choice),
        "parallel_tool_calls": body.parallel_tool_calls,
        "chat_template_kwargs": body.chat_template_kwargs,
    }
    if reasoning.effort == "none":
        off = {"enable_thinking": False}
        values["chat_template_kwargs"] = off | (body.chat_template_kwargs or {})
    else:
        values["reasoning_effort"] = reasoning.effort
    form = _format(body.text)
    if form is not None:
        values["response_format"] = form
    return chat_of(body, messages_of(items, body.instructions), **values)


def _tool(i: int, tool: dict[str, Any]) -> dict[str, Any]:
    where = f"tools[{i}]"
    if tool.get("type") != "function":
        raise bad_request(
            f"`{where}.type` is {tool.get('type')!r}: this server runs no tools itself; "
            "describe your own with the type `function`",
            "tools",
        )
    name = text_field(tool, "name", where)
    return function_tool(name, tool.get("description"), tool.get("parameters"), tool.get("strict"))


def _choice(choice: Any) -> Any:
    """`tool_choice` as chat has it."""
    kind = choice.get("type") if isinstance(choice, dict) else choice
    if kind == "function":
        return {"type": "function", "function": {"name": text_field(choice, "name", "tool_choice")}}
    if kind in (None, "none", "auto", "required", "allowed_tools"):
        return choice
    raise bad_request(
        "`tool_choice` must be `none`, `auto`, `required`, a `function` or `allowed_tools`, "
        f"got {kind!r}",
        "tool_choice",
    )


def _format(text: TextConfig | None) -> dict[str, Any] | None:
    form = text.format if text else None
    if form is None:
        return None
    if form.get("type") not in FORMATS:
        raise unknown_part(form.get("type"), "text.format", FORMATS)
    if form["type"] != "json_schema":
        return {"type": form["type"]}
    schema = {k: v for k, v in form.items() if k != "type"}
    return {"type": "json_schema", "json_schema": schema}


def new_id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"


def response_of(
    body: ResponsesRequest, response_id: str, created: int, model: str, defaults: dict[str, Any]
) -> ResponseObject:
    """The response before it says anything; `defaults` is the model's generation_config."""
    own = default_fields(defaults)
    text = body.text or TextConfig()
    return ResponseObject(
        id=response_id,
        created_at=created,
        status="queued" if body.background else "in_progress",
        background=bool(body.background),
        instructions=body.instructions,
        max_output_tokens=body.max_output_tokens,
        max_tool_calls=body.max_tool_calls,
        metadata=body.metadata or {},
        model=model,
        output=[],
        parallel_tool_calls=body.parallel_tool_calls is not False,
        previous_response_id=body.previous_response_id,
        prompt_cache_key=body.prompt_cache_key,
        reasoning=body.reasoning or Reasoning(),
        safety_identifier=body.safety_identifier,
        service_tier="default" if body.service_tier in (None, "auto") else body.service_tier,
        store=body.store is not False,
        temperature=own.get("temperature", 1.0) if body.temperature is None else body.temperature,
        text=TextConfig(text.format or {"type": "text"}, text.verbosity),
        tool_choice="auto" if body.tool_choice is None else body.tool_choice,
        tools=body.tools or [],
        top_logprobs=body.top_logprobs or 0,
        top_p=own.get("top_p", 1.0) if body.top_p is None else body.top_p,
        truncation=body.truncation or "disabled",
        user=body.user,
    )
