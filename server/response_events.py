"""What a turn says, as OpenAI's output items: streamed as events or whole.

An item begins with the first piece of its kind and ends with the first piece of another. Per token
only the text is encoded; what stands around it is made once an item.
"""

import time
from typing import Any

import msgspec

from octavo.server.collect import Delta, ToolCall
from octavo.server.conversions.responses import new_id
from octavo.server.logprobs import chat_logprobs
from octavo.server.protocol.errors import ApiError
from octavo.server.protocol.responses import ResponseObject, ResponsesUsage

json = msgspec.json.Encoder().encode
PARTS: dict[str, dict[str, Any]] = {
    "message": {"type": "output_text", "text": "", "annotations": [], "logprobs": []},
    "reasoning": {"type": "reasoning_text", "text": ""},
}
NAMES = {
    "message": "response.output_text",
    "reasoning": "response.reasoning_text",
    "function_call": "response.function_call_arguments",
}


class Events:
    """The life of one response: its frames, and its items in `response.output`."""

    def __init__(self, response: ResponseObject, top_logprobs: int, as_ids: bool = False) -> None:
        self.response = response
        self.number = 0  # of the next event
        self._top, self._as_ids = top_logprobs, as_ids
        self._open: tuple[str, int] | None = None  # its kind, which call of a tool
        self._pieces: list[str] = []  # of the open item
        self._rows: list[Any] = []  # log probabilities of the open message
        self._held: list[Any] = []  # of tokens whose text is yet to come
        self._head, self._tail = b"", b""
        self.finish_reason: str | None = None

    def event(self, kind: str, **fields: Any) -> bytes:
        """One server-sent event."""
        body = {"type": kind, "sequence_number": self.number, **fields}
        self.number += 1
        return b"event: %b\ndata: %b\n\n" % (kind.encode(), json(body))

    def start(self) -> bytes:
        """That it exists, and that it is worked on."""
        created = self.event("response.created", response=self.response)
        if self.response.status == "queued":
            created += self.event("response.queued", response=self.response)
        self.response.status = "in_progress"
        return created + self.event("response.in_progress", response=self.response)

    def add(self, delta: Delta) -> bytes:
        """The events of what is new."""
        frames = b""
        if delta.reasoning:
            frames += self._piece(("reasoning", 0), delta.reasoning)
        elif delta.logprobs:
            self._held += self._logprobs(delta)
        if delta.text:
            frames += self._piece(("message", 0), delta.text)
        for one in delta.tool_calls:
            frames += self._piece(("function_call", one.index), one.arguments, one)
        self.finish_reason = delta.finish_reason or self.finish_reason
        return frames

    def end(self) -> bytes:
        """Close what is open. A response that says nothing has one empty message."""
        frames = b"" if self.response.output else self._begin(("message", 0), None)
        cut = self.finish_reason == "length"
        return frames + self._close("incomplete" if cut else "completed")

    def complete(self, usage: ResponsesUsage) -> None:
        """All has been said, the last item is closed."""
        response, cut = self.response, self.finish_reason == "length"
        response.usage = usage
        response.completed_at = None if cut else int(time.time())
        response.status = "incomplete" if cut else "completed"
        response.incomplete_details = {"reason": "max_output_tokens"} if cut else None

    def fail(self, error: ApiError) -> bytes:
        """An error after the first byte."""
        frames = self._close("incomplete")
        code = "rate_limit_exceeded" if error.status == 503 else "server_error"
        self.response.error = {"code": code, "message": error.message}
        self.response.status = "failed"
        return frames + self.last()

    def cancelled(self) -> None:
        """Nobody wants the rest."""
        self._close("incomplete")
        self.response.status = "cancelled"

    def last(self) -> bytes:
        """The event that says how it ended."""
        return self.event(f"response.{self.response.status}", response=self.response)

    @property
    def thought(self) -> str:
        """What was thought, so far as its items are closed."""
        return "".join(
            part["text"]
            for item in self.response.output
            if item["type"] == "reasoning"
            for part in item["content"]
        )

    def _logprobs(self, delta: Delta) -> list[Any]:
        return chat_logprobs(delta.token_ids, delta.logprobs, self._top, self._as_ids).content

    def _piece(self, item: tuple[str, int], piece: str, tool: ToolCall | None = None) -> bytes:
        frames = b""
        if self._open != item:
            frames = self._close("completed") + self._begin(item, tool)
        if not piece:
            return frames
        self._pieces.append(piece)
        rows = b""
        if item[0] == "message":
            rows = json(self._held) if self._held else b"[]"
            self._rows += self._held
            self._held = []
        number, self.number = b"%d" % self.number, self.number + 1
        tail = b',"logprobs":%b}\n\n' % rows if rows else b"}\n\n"
        return b"".join((frames, self._head, number, self._tail, json(piece), tail))

    def _begin(self, item: tuple[str, int], tool: ToolCall | None) -> bytes:
        kind, index = item[0], len(self.response.output)
        self._open, self._pieces, self._rows = item, [], []
        made: dict[str, Any] = {"type": kind, "status": "in_progress"}
        if kind == "message":
            made |= {"id": new_id("msg"), "role": "assistant", "content": []}
        elif kind == "reasoning":
            made |= {"id": new_id("rs"), "summary": [], "content": [], "encrypted_content": None}
        else:
            call_id = (tool.id if tool else None) or new_id("call")
            made |= {"id": new_id("fc"), "call_id": call_id, "arguments": ""}
            made["name"] = (tool.name if tool else None) or ""
        self.response.output.append(made)
        where: dict[str, Any] = {"item_id": made["id"], "output_index": index}
        frames = self.event("response.output_item.added", output_index=index, item=made)
        if kind in PARTS:
            where["content_index"] = 0
            frames += self.event("response.content_part.added", **where, part=PARTS[kind])
        name = f"{NAMES[kind]}.delta".encode()
        self._head = b'event: %b\ndata: {"type":"%b","sequence_number":' % (name, name)
        self._tail = b"," + json(where)[1:-1] + b',"delta":'
        return frames

    def _close(self, status: str) -> bytes:
        if self._open is None:
            return b""
        kind, self._open = self._open[0], None
        index = len(self.response.output) - 1
        item, whole = self.response.output[index], "".join(self._pieces)
        item["status"] = status
        where: dict[str, Any] = {"item_id": item["id"], "output_index": index}
        if kind == "function_call":
            item["arguments"] = whole
            name = item["name"]
            frames = self.event(f"{NAMES[kind]}.done", **where, name=name, arguments=whole)
        else:
            where["content_index"] = 0
            part = {**PARTS[kind], "text": whole}
            rows: dict[str, Any] = {}
            if kind == "message":
                self._rows, self._held = self._rows + self._held, []
                part["logprobs"] = rows["logprobs"] = self._rows
            item["content"] = [part]
            frames = self.event(f"{NAMES[kind]}.done", **where, text=whole, **rows)
            frames += self.event("response.content_part.done", **where, part=part)
        return frames + self.event("response.output_item.done", output_index=index, item=item)
