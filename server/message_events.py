"""What a turn says, in Anthropic's words: content blocks, streamed as events or whole.

A block begins with the first piece of its kind and ends with the first piece of another. Per token
only the text is encoded; what stands around it is made once a block.
"""

import base64
import hashlib
from typing import Any

import msgspec

from octavo.server.collect import Delta, ToolCall
from octavo.server.protocol.errors import ApiError
from octavo.server.protocol.messages import Message, MessagesUsage, error_body

json = msgspec.json.Encoder().encode
STOP_REASONS = {"length": "max_tokens", "tool_calls": "tool_use", "stop": "end_turn"}
PING = b'event: ping\ndata: {"type":"ping"}\n\n'


def event(kind: str, **fields: Any) -> bytes:
    """One server-sent event."""
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), json({"type": kind, **fields}))


def failure(error: ApiError, request_id: str) -> bytes:
    """An error after the first byte."""
    return b"event: error\ndata: %b\n\n" % json(error_body(error, request_id))


def signature(thought: str) -> str:
    """Clients give a thought back only with a signature; nothing here checks it."""
    return base64.b64encode(hashlib.sha256(thought.encode(errors="replace")).digest()).decode()


class Blocks:
    """The content of one message as it grows."""

    def __init__(self, message_id: str, model: str) -> None:
        self._id, self._model = message_id, model
        self.content: list[dict[str, Any]] = []
        self._open: tuple[str, int] | None = None  # its kind, which call of a tool
        self._pieces: list[str] = []  # of the open block
        self._around = (b"", b"")  # what stands before and after a piece
        self.stop_reason: str | None = None
        self.stop_sequence: str | None = None

    def start(self, usage: MessagesUsage) -> bytes:
        """Who speaks."""
        message = Message(id=self._id, model=self._model, content=[], usage=usage)
        return event("message_start", message=message) + PING

    def add(self, delta: Delta) -> bytes:
        """The events of what is new."""
        frames = b""
        if delta.reasoning:
            frames += self._piece(("thinking", 0), delta.reasoning)
        if delta.text:
            frames += self._piece(("text", 0), delta.text)
        for one in delta.tool_calls:
            frames += self._piece(("tool_use", one.index), one.arguments, one)
        if delta.finish_reason is not None:
            self.stop_reason = STOP_REASONS.get(delta.finish_reason, "end_turn")
            if self.stop_reason == "end_turn" and isinstance(delta.stop_reason, str):
                self.stop_reason, self.stop_sequence = "stop_sequence", delta.stop_reason
        return frames

    def end(self) -> bytes:
        """Close what is open. A message that says nothing has one empty text."""
        frames = b"" if self.content else self._begin(("text", 0), None)
        return frames + self._close()

    def stop(self, usage: MessagesUsage) -> bytes:
        """Why it ended, and what it took."""
        delta = {"stop_reason": self.stop_reason, "stop_sequence": self.stop_sequence}
        return event("message_delta", delta=delta, usage=usage) + event("message_stop")

    def message(self, usage: MessagesUsage) -> Message:
        """All of it."""
        return Message(
            id=self._id,
            model=self._model,
            content=self.content,
            stop_reason=self.stop_reason,
            stop_sequence=self.stop_sequence,
            usage=usage,
        )

    @property
    def thought(self) -> str:
        """What was thought, so far as its blocks are closed."""
        return "".join(block.get("thinking", "") for block in self.content)

    def _piece(self, block: tuple[str, int], piece: str, tool: ToolCall | None = None) -> bytes:
        frames = b""
        if self._open != block:
            frames = self._close() + self._begin(block, tool)
        if not piece:
            return frames
        self._pieces.append(piece)
        return b"".join((frames, self._around[0], json(piece), self._around[1]))

    def _begin(self, block: tuple[str, int], tool: ToolCall | None) -> bytes:
        kind, index = block[0], len(self.content)
        self._open, self._pieces = block, []
        made: dict[str, Any] = {"type": kind}
        if kind == "text":
            made, delta, field = made | {"text": ""}, "text_delta", "text"
        elif kind == "thinking":
            made |= {"thinking": "", "signature": ""}
            delta, field = "thinking_delta", "thinking"
        else:
            name = tool.name if tool else ""
            call_id = (tool.id if tool else None) or f"toolu_{self._id[4:]}_{block[1]}"
            made |= {"id": call_id, "name": name or "", "input": {}}
            delta, field = "input_json_delta", "partial_json"
        self.content.append(made)
        head = b'event: content_block_delta\ndata: {"type":"content_block_delta","index":%d,'
        names = b'"delta":{"type":"%b","%b":' % (delta.encode(), field.encode())
        self._around = (head % index + names, b"}}\n\n")
        return event("content_block_start", index=index, content_block=made)

    def _close(self) -> bytes:
        if self._open is None:
            return b""
        block, index, whole = self.content[-1], len(self.content) - 1, "".join(self._pieces)
        self._open, frames = None, b""
        if block["type"] == "text":
            block["text"] = whole
        elif block["type"] == "thinking":
            block["thinking"], block["signature"] = whole, signature(whole)
            delta = {"type": "signature_delta", "signature": block["signature"]}
            frames = event("content_block_delta", index=index, delta=delta)
        else:
            block["input"] = _arguments(whole)
        return frames + event("content_block_stop", index=index)


def _arguments(text: str) -> dict[str, Any]:
    """What a tool is called with. A call that was cut off has what could not be read as `_raw`."""
    try:
        value = msgspec.json.decode(text or "{}")
    except msgspec.DecodeError:
        return {"_raw": text}
    return value if isinstance(value, dict) else {"_raw": text}
