"""Generations as one stream of deltas, or as whole results."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from octavo.engine.text.outputs import RequestOutput
from octavo.server.client import Generation


@dataclass
class ToolCall:
    """A call of a tool, or a piece of one: pieces of the same index follow each other."""

    index: int  # which call of its choice
    id: str | None = None  # with the first piece only
    name: str | None = None  # with the first piece only
    arguments: str = ""  # JSON text, or the next part of it


@dataclass
class Delta:
    """What is new for one choice; what piled up between two looks is one delta."""

    prompt: int  # which prompt of the body
    index: int  # which choice of that prompt
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)  # a dict of token id to Logprob a token
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    prompt_logprobs: list[Any] | None = None
    cached_tokens: int = 0
    reasoning: str = ""  # thought before the answer, kept out of `text`
    tool_calls: list[ToolCall] = field(default_factory=list)  # likewise

    @property
    def finish(self) -> tuple[str, int | str | None] | None:
        if self.finish_reason is None:
            return None
        return self.finish_reason, self.stop_reason

    def extend(self, other: "Delta") -> None:
        self.text += other.text
        self.token_ids += other.token_ids
        self.logprobs += other.logprobs
        self.finish_reason = other.finish_reason or self.finish_reason
        self.stop_reason = self.stop_reason if other.stop_reason is None else other.stop_reason
        self.prompt_logprobs = self.prompt_logprobs or other.prompt_logprobs
        self.cached_tokens = max(self.cached_tokens, other.cached_tokens)
        self.reasoning += other.reasoning
        for call in other.tool_calls:
            if self.tool_calls and self.tool_calls[-1].index == call.index:
                self.tool_calls[-1].arguments += call.arguments
            else:
                self.tool_calls.append(call)


def merge(choices: dict[int, Delta], batch: list[Delta]) -> None:
    """Add what is new to what each choice said so far."""
    for delta in batch:
        if delta.index not in choices:
            choices[delta.index] = Delta(delta.prompt, delta.index)
        choices[delta.index].extend(delta)  # joins the pieces of a call, those of one delta too


def to_deltas(prompt: int, batch: list[RequestOutput]) -> list[Delta]:
    """One delta a choice, in the order in which choices first spoke."""
    merged: dict[int, Delta] = {}
    for output in batch:
        for choice in output.outputs:
            delta = Delta(
                prompt,
                choice.index,
                choice.text,
                list(choice.token_ids),
                list(choice.logprobs or ()),
                choice.finish_reason,
                choice.stop_reason,
                output.prompt_logprobs,
                output.num_cached_tokens or 0,
            )
            if choice.index in merged:
                merged[choice.index].extend(delta)
            else:
                merged[choice.index] = delta
    return list(merged.values())


async def deltas(generations: list[Generation]) -> AsyncIterator[list[Delta]]:
    """The deltas of all prompts as they come; an error of one is the error of all."""
    if len(generations) == 1:
        async for batch in generations[0]:
            yield to_deltas(0, batch)
        return
    queue: asyncio.Queue[list[Delta] | BaseException | None] = asyncio.Queue()

    async def pump(prompt: int, generation: Generation) -> None:
        try:
            async for batch in generation:
                queue.put_nowait(to_deltas(prompt, batch))
            queue.put_nowait(None)
        except BaseException as error:
            queue.put_nowait(error)

    pumps = [asyncio.ensure_future(pump(i, g)) for i, g in enumerate(generations)]
    try:
        running = len(pumps)
        while running:
            item = await queue.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                running -= 1
            else:
                yield item
    finally:
        for task in pumps:
            task.cancel()


async def collect(generations: list[Generation]) -> list[list[Delta]]:
    """Everything: for each prompt its choices, each with all its text."""
    whole: list[dict[int, Delta]] = [{} for _ in generations]
    async for batch in deltas(generations):
        for delta in batch:
            merge(whole[delta.prompt], [delta])
    return [[choices[i] for i in sorted(choices)] for choices in whole]
