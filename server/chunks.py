"""Server-sent chunks built from bytes: per token only the text is encoded, never a whole object.

data: {"id":...,"choices":[{"index":0,"delta":{"content":"Hi"},"logprobs":null,...}]}
------ once a stream -----          -                   ---- only these per chunk
"""

from collections.abc import Sequence
from typing import Any

import msgspec

from octavo.server.collect import Delta, ToolCall
from octavo.server.protocol.sampling import Usage

json = msgspec.json.Encoder().encode


class Chunks:
    """Builds the frames of one stream."""

    def __init__(self, kind: str, request_id: str, created: int, model: str) -> None:
        """`kind` is the value of "object"."""
        head = {"id": request_id, "object": kind, "created": created, "model": model}
        self._head = b"data: " + json(head)[:-1] + b',"choices":['
        self._chat = kind == "chat.completion.chunk"
        self._before = b',"delta":{"content":' if self._chat else b',"text":'
        self._after = b"}" if self._chat else b""

    def role(self, index: int, prompt_token_ids: list[int] | None = None) -> bytes:
        """The first chunk of a chat choice: who speaks."""
        extra = _field(b"prompt_token_ids", prompt_token_ids)
        return (
            self._head + b'{"index":%d,"delta":{"role":"assistant","content":""},"logprobs":null,'
            b'"finish_reason":null}]%b}\n\n' % (index, extra)
        )

    def text(
        self,
        index: int,
        text: str,
        finish: tuple[str, int | str | None] | None = None,
        logprobs: msgspec.Struct | None = None,
        token_ids: Sequence[int] | None = None,
        usage: Usage | None = None,
        prompt_token_ids: list[int] | None = None,
    ) -> bytes:
        """One delta; `finish` is (finish_reason, stop_reason)."""
        if finish is None and logprobs is None and token_ids is None and usage is None:
            return b'%b{"index":%d%b%b%b,"logprobs":null,"finish_reason":null}]}\n\n' % (
                self._head,
                index,
                self._before,
                json(text),
                self._after,
            )
        reason, stop = finish or (None, None)
        parts = [
            self._head,
            b'{"index":%d' % index,
            self._before,
            json(text),
            self._after,
            b',"logprobs":',
            json(logprobs),
            b',"finish_reason":',
            json(reason),
            b',"stop_reason":' + json(stop) if finish else b"",
            _field(b"token_ids", token_ids),
            b"" if self._chat else _field(b"prompt_token_ids", prompt_token_ids),
            b"}]",
            _field(b"usage", usage),
            b"}\n\n",
        ]
        return b"".join(parts)

    def parts(
        self,
        delta: Delta,
        logprobs: msgspec.Struct | None = None,
        token_ids: Sequence[int] | None = None,
        usage: Usage | None = None,
    ) -> bytes:
        """A delta of a chat that has thoughts or calls, and what text and end come with them."""
        pieces: list[dict[str, Any]] = []
        if delta.reasoning:
            pieces.append({"reasoning": delta.reasoning})
        if delta.text:
            pieces.append({"content": delta.text})
        if delta.tool_calls:
            pieces.append({"tool_calls": [_call(call) for call in delta.tool_calls]})
        frames = [self._piece(delta.index, piece) for piece in pieces[:-1]]
        last = (*(delta.finish or (None, None)), logprobs, token_ids, usage)
        return b"".join([*frames, self._piece(delta.index, pieces[-1], *last)])

    def _piece(
        self,
        index: int,
        piece: dict[str, Any],
        reason: str | None = None,
        stop: int | str | None = None,
        logprobs: msgspec.Struct | None = None,
        token_ids: Sequence[int] | None = None,
        usage: Usage | None = None,
    ) -> bytes:
        choice = {"index": index, "delta": piece, "logprobs": logprobs, "finish_reason": reason}
        if reason is not None:
            choice["stop_reason"] = stop
        if token_ids is not None:
            choice["token_ids"] = token_ids
        return b"".join([self._head, json(choice), b"]", _field(b"usage", usage), b"}\n\n"])

    def usage(self, usage: Usage) -> bytes:
        """The last chunk, with no choices."""
        return self._head + b'],"usage":' + json(usage) + b"}\n\n"


def _call(call: ToolCall) -> dict[str, Any]:
    """A piece of a call; the first says whose it is."""
    if call.id is None:
        return {"index": call.index, "function": {"arguments": call.arguments}}
    function = {"name": call.name, "arguments": call.arguments}
    return {"index": call.index, "id": call.id, "type": "function", "function": function}


def _field(name: bytes, value: Any) -> bytes:
    return b"" if value is None else b',"%b":%b' % (name, json(value))
