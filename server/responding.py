"""Responses: how one is asked for, worked on here or in the background, kept and found again."""

import asyncio
import contextlib
import logging
import sqlite3
from collections.abc import AsyncIterator
from dataclasses import dataclass

from octavo.server.conversions.common import own_names
from octavo.server.conversions.responses import NAMES, Item, items_of, response_of, to_chat
from octavo.server.dialogue import Turn, begin
from octavo.server.frontend import Frontend, RequestId
from octavo.server.protocol.chat import ChatCompletionRequest
from octavo.server.protocol.errors import ApiError, bad_request
from octavo.server.protocol.responses import (
    ItemList,
    ResponseObject,
    ResponsesRequest,
    ResponsesUsage,
    usage_of,
)
from octavo.server.response_events import Events
from octavo.server.response_store import ENDED, Limits, ResponseStore, Stored

LOOK = 0.2  # seconds between two looks at what other processes want cancelled
FOLLOW = 0.05  # seconds between two looks at events that another task keeps
CANCEL_PATIENCE = 5.0  # seconds that a cancellation may take
logger = logging.getLogger("octavo.server")


@dataclass
class Job:
    """A response on its way."""

    turn: Turn
    items: list[Item]  # the conversation that it answers
    events: Events

    @property
    def response(self) -> ResponseObject:
        return self.events.response


class Responses:
    """All that /v1/responses does; one a process."""

    def __init__(self, frontend: Frontend, folder: str | None) -> None:
        settings = frontend.settings
        limits = Limits(
            settings.max_stored_responses,
            settings.max_stored_response_bytes,
            settings.stored_response_ttl,
        )
        self._frontend, self._store = frontend, ResponseStore(folder, limits)
        self._tasks: dict[str, asyncio.Task[None]] = {}  # work in the background
        self._watch: asyncio.Task[None] | None = None

    async def begin(self, body: ResponsesRequest, name: RequestId) -> Job:
        """Check, find what came before, render and submit."""
        body.check()
        items = items_of(body)
        frontend = self._frontend
        frontend.check_model(body.model)
        if body.background and self._store.limits.count == 0:
            raise bad_request("`background` needs a server that keeps responses", "background")
        if body.request_id and await self._store.get(name.public) is not None:
            raise bad_request(f"a response `{name.public}` exists already", "request_id")
        if body.previous_response_id is not None:
            items = await self._before(body.previous_response_id) + items
        chat = to_chat(body, items)
        if body.truncation == "auto":
            chat = await self._fitting(chat)
        with own_names(NAMES):
            turn = await begin(frontend, chat, name.public)
        model = body.model or frontend.names[0]
        defaults = frontend.generation_config
        response = response_of(body, name.public, name.created, model, defaults)
        as_ids = bool(body.return_tokens_as_token_ids)
        return Job(turn, items, Events(response, body.top_logprobs or 0, as_ids))

    async def _before(self, name: str) -> list[Item]:
        stored = await self._store.get(name)
        if stored is None:
            raise bad_request(
                f"there is no previous response `{name}`: it was not stored, or is no longer; "
                "send all items in `input`",
                "previous_response_id",
            )
        if stored.response.status not in ENDED:
            raise bad_request(
                f"the previous response `{name}` is {stored.response.status}; wait until it ends",
                "previous_response_id",
            )
        return stored.items + stored.response.output

    async def _fitting(self, chat: ChatCompletionRequest) -> ChatCompletionRequest:
        """Without as many of the oldest messages as the context cannot take."""
        await self._frontend.client.until_ready()
        ready = self._frontend.client.ready
        assert ready is not None, "until_ready returned"
        room = ready.max_model_len - (chat.most_tokens or 1)
        system = [m for m in chat.messages[:1] if m["role"] == "system"]
        rest = chat.messages[len(system) :]
        starts = [i for i, m in enumerate(rest) if i == 0 or m["role"] == "user"]
        low, high = 0, len(starts) - 1  # the first start that fits; the last when none does
        while low < high:
            middle = (low + high) // 2
            chat.messages = system + rest[starts[middle] :]
            fits = len((await self._frontend.chat_prompt(chat)).token_ids) <= room
            low, high = (low, middle) if fits else (middle + 1, high)
        chat.messages = system + rest[starts[low] :]
        return chat

    async def whole(self, job: Job) -> ResponseObject:
        """Everything at once. ApiError when the engine fails."""
        events = job.events
        events.response.status = "in_progress"
        said = (await job.turn.whole())[0]
        events.add(said)
        events.end()
        usage = await self._usage(job, len(said.token_ids), said.cached_tokens)
        events.complete(usage)
        await self._keep(job)
        return job.response

    async def stream(self, job: Job, keep: bool = True) -> AsyncIterator[bytes]:
        """Events as they come; the last one after the response was kept."""
        events, generated, cached = job.events, 0, 0
        yield events.start()
        try:
            async for batch in job.turn.deltas():
                frames = []
                for delta in batch:
                    generated += len(delta.token_ids)
                    cached = max(cached, delta.cached_tokens)
                    frames.append(events.add(delta))
                if any(frames):
                    yield b"".join(frames)
            last = events.end()
            events.complete(await self._usage(job, generated, cached))
            if keep:
                await self._keep(job)
            last += events.last()
        except ApiError as error:
            last = events.fail(error)
        except Exception:
            logger.exception("a response failed")
            failure = ApiError(500, "internal error; the server's log has the details")
            last = events.fail(failure)
        yield last

    async def _usage(self, job: Job, generated: int, cached: int) -> ResponsesUsage:
        """What it took. Thought is counted by its text, so a token more or less is possible."""
        thought = 0
        if job.events.thought:
            thought = len(await self._frontend.encode(job.events.thought, False))
        asked = len(job.turn.prompt.token_ids)
        return usage_of(asked, cached, generated, min(thought, generated))

    async def _keep(self, job: Job, streams: bool = False) -> None:
        """Store it, if wanted. A store that is broken does not break answers."""
        if not job.response.store:
            return
        try:
            await self._store.put(job.response, job.items, streams)
        except sqlite3.Error:
            logger.exception("a response could not be stored")

    # --- in the background

    async def detach(self, job: Job, streams: bool) -> None:
        """Work on it without a reader; `streams` keeps its events."""
        await self._keep(job, streams)
        name = job.response.id
        task = asyncio.ensure_future(self._work(job, streams))
        self._tasks[name] = task
        task.add_done_callback(lambda _: self._tasks.pop(name, None))
        if self._watch is None or self._watch.done():
            self._watch = asyncio.ensure_future(self._keep_watch())

    async def _work(self, job: Job, streams: bool) -> None:
        try:
            number = 0
            async for frames in self.stream(job, keep=False):
                if number == 0:
                    await self._keep(job, streams)
                if streams:
                    await self._store.append(job.response.id, number, frames)
                number = job.events.number
        except asyncio.CancelledError:
            number = job.events.number
            job.events.cancelled()
            if streams:
                job.events.number = number
                frames = job.events.event("response.cancelled", response=job.response)
                await self._store.append(job.response.id, number, frames)
        finally:
            job.turn.cancel()
            if await self._store.get(job.response.id) is not None:  # else it was deleted
                await self._keep(job, streams)

    async def _keep_watch(self) -> None:
        while self._tasks:
            await asyncio.sleep(LOOK)
            names = list(self._tasks)
            for name in await self._store.unwanted(names) if names else ():
                self._drop(name)

    def _drop(self, name: str) -> None:
        task = self._tasks.get(name)
        if task is not None and not task.cancelling():  # once: its end may be under way
            task.cancel()

    async def follow(self, name: str, after: int) -> AsyncIterator[bytes]:
        """The kept events behind number `after`, until the last."""
        while True:
            frames, after, more = await self._store.events(name, after)
            if frames:
                yield frames
            if not more:
                return
            await asyncio.sleep(FOLLOW)

    # --- found again

    async def find(self, name: str) -> Stored:
        """ApiError 404 when it is not kept."""
        stored = await self._store.get(name)
        if stored is None:
            raise ApiError(
                404, f"there is no response `{name}`: it was not stored, or is no longer"
            )
        return stored

    async def delete(self, name: str) -> None:
        """Forget it, and end the work on it."""
        await self.find(name)
        await self._store.delete(name)
        self._drop(name)

    async def cancel(self, name: str) -> ResponseObject:
        """End the work on it, in whichever process; what has ended stays as it is."""
        stored = await self.find(name)
        if not stored.response.background:
            raise bad_request(
                f"the response `{name}` was not asked for with `background`; "
                "leave its connection to cancel it",
                "response_id",
            )
        if stored.response.status not in ENDED:
            await self._store.ask_to_cancel(name)
            self._drop(name)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CANCEL_PATIENCE):
                    while stored.response.status not in ENDED:
                        await asyncio.sleep(FOLLOW)
                        stored = await self.find(name)
        return stored.response

    async def input_items(self, name: str, limit: int, newest: bool, after: str | None) -> ItemList:
        """A page of the items that the response answers."""
        items = (await self.find(name)).items
        items = items[::-1] if newest else items
        if after is not None:
            ids = [item["id"] for item in items]
            if after not in ids:
                raise bad_request(f"`after` names no item of `{name}`: `{after}`", "after")
            items = items[ids.index(after) + 1 :]
        page = items[:limit]
        first, last = (page[0]["id"], page[-1]["id"]) if page else (None, None)
        return ItemList(data=page, first_id=first, last_id=last, has_more=len(items) > limit)

    async def close(self) -> None:
        """End what is in the background."""
        tasks = [*self._tasks.values(), *([self._watch] if self._watch else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._store.close()
