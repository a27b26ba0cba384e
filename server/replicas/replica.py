"""One replica: an API without a port, in front of an engine process of its own."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing

from octavo.engine.config import ConfigError, EngineConfig
from octavo.engine.process import CORE
from octavo.engine.text.opened import open_text
from octavo.engine.text.processor import OutputProcessor
from octavo.server.app import create_app
from octavo.server.client import EngineClient
from octavo.server.frontend import Frontend
from octavo.server.launch import EngineProcess
from octavo.server.replicas.door import ReplicaLost
from octavo.server.replicas.exchange import Answer, Head, Order, answer, whole
from octavo.server.settings import ServerSettings

LOOK = 0.25  # seconds between two looks at the engine
LAST_WORDS = 1.0  # seconds for the error events of open streams to leave
ENGINE_GRACE = 10.0  # seconds for the engine to end


class Replica:
    """Answers Orders. Its engine's end is its own: `on_end` is called then."""

    def __init__(
        self,
        config: EngineConfig,
        settings: ServerSettings,
        name: str,
        *,
        on_end: Callable[[], None],
        core: str = CORE,
    ) -> None:
        """Starts the engine process. ConfigError when the model's files cannot be used."""
        self.name, self._on_end = name, on_end
        text = open_text(config, settings.chat_template)
        self._engine = EngineProcess(config, core)
        self.client = EngineClient(
            self._engine.address,
            OutputProcessor(text.tokenizer),
            ended=self._engine.ended,
            max_queued=max(1, config.max_num_queued_reqs),
            hung_after=settings.hung_after,
        )
        folder = self._engine.address.removeprefix("ipc://")
        self._app = create_app(Frontend(settings, config, text, self.client, folder))
        self._lifespan = self._app.router.lifespan_context(self._app)
        self._watch: asyncio.Task[None] | None = None
        self._over = asyncio.Event()

    async def start(self) -> None:
        """Until the engine can be used; ConfigError when it cannot."""
        await self._lifespan.__aenter__()
        await self.client.settled.wait()
        if self.client.last_words is not None:
            words = self.client.last_words
            await self.stop()
            raise ConfigError(words)
        self._watch = asyncio.create_task(self._end_with_engine())

    async def stop(self) -> None:
        """End the engine; what is open gets an error."""
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None
        await self._lifespan.__aexit__(None, None, None)
        await asyncio.to_thread(self._engine.stop, ENGINE_GRACE)

    async def answer(self, order: Order) -> AsyncIterator[Head | bytes]:
        """A Head, then bytes; ReplicaLost where another replica would do better."""
        if self.client.last_words is not None:
            # Refused at once, it would come straight back: without work this replica looks best.
            await self._over.wait()
            self.check()
        async with aclosing(answer(self._app, order)) as pieces:  # type: ignore[type-var]
            async for piece in pieces:
                if isinstance(piece, Head) and piece.status >= 500:
                    self.check()
                yield piece

    async def tell(self, order: Order) -> Answer:
        """What this replica, and no other, says to it."""
        return await whole(self._app, order, self.name)

    def check(self) -> None:
        """ReplicaLost when the engine has ended."""
        if self.client.last_words is not None:
            raise ReplicaLost(f"the engine stopped: {self.client.last_words}")

    def trouble(self) -> str | None:
        """Why it cannot be used, in a sentence; None when it can."""
        return self.client.trouble()

    async def _end_with_engine(self) -> None:
        """A replica without an engine is of no use: it ends, and another takes its place."""
        while self.client.last_words is None:
            await asyncio.sleep(LOOK)
        await asyncio.sleep(LAST_WORDS)
        self._on_end()
        self._over.set()
