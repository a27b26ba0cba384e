"""AsyncLLM: the engine on a thread of its own, for many callers on one event loop."""

import asyncio
import itertools
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Self

from octavo.engine.config import EngineConfig
from octavo.engine.core import EngineCore
from octavo.engine.encoder import EncoderCore
from octavo.engine.messages import Output
from octavo.engine.progress import startup_progress
from octavo.engine.requests import Prompt, Requests
from octavo.engine.runner import choose_runner
from octavo.engine.sampling_params import (
    RequestOutputKind,
    SamplingParams,
    StructuredOutputsParams,
)
from octavo.engine.text.opened import Message, open_text
from octavo.engine.text.outputs import EmbeddingOutput, EmbeddingRequestOutput, RequestOutput
from octavo.engine.text.reading import Texts, check_dimensions, embedding, pooler_for


class AsyncLLM:
    """Like LLM; every call is of one event loop, the first that generates.

    async for output in llm.generate("Hello", SamplingParams()): ...
    """

    def __init__(
        self,
        model: str = "smollm2-135m",
        *,
        quiet: bool = False,
        chat_template: str = "",
        **settings: Any,
    ) -> None:
        """Load and compile (this blocks). `settings` are EngineConfig's. Raises ConfigError."""
        self.config = EngineConfig(model=model, **settings)
        self.config.validate()
        self._text = open_text(self.config, chat_template)
        with startup_progress(quiet) as progress:
            self._core: EngineCore | EncoderCore
            if choose_runner(self.config) == "pooling":
                self._core = EncoderCore(self.config, progress=progress)
            else:
                self._core = EngineCore(self.config, progress=progress)
        self._ready = self._core.ready()
        self._requests = Requests(self.config, self._text, self._ready)
        self._handles = itertools.count(1)
        self._vectors: dict[int, asyncio.Future[bytes]] = {}  # of texts on their way, by handle
        self._loop: asyncio.AbstractEventLoop | None = None
        self._streams: dict[str, asyncio.Queue[RequestOutput | Exception]] = {}
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name="octavo-engine", daemon=True)
        self._thread.start()
        self._failure: Exception | None = None
        self._closed = False

    # --- the event loop's side

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str = "",
        *,
        priority: int = 0,
    ) -> AsyncIterator[RequestOutput]:
        """Outputs as they come, of the parameters' kind; leaving the loop aborts the request."""
        self._begin()
        if self._ready.pooler is not None:
            raise ValueError(f"the model `{self.config.model}` reads and generates none: use embed")
        if sampling_params is not None and sampling_params.structured_outputs is not None:
            await self.check(sampling_params.structured_outputs)
        request = self._requests.prepare(
            prompt, sampling_params, request_id=request_id, priority=priority
        )
        name = request.request_id
        stream = self._streams[name] = asyncio.Queue()
        self._add(request)
        try:
            while True:
                output = await stream.get()
                if isinstance(output, Exception):
                    raise output
                if output.error:
                    raise RuntimeError(output.error)
                yield output
                if output.finished:
                    return
        finally:
            self._streams.pop(name, None)
            self._abort(self._requests.processor.abort(name))

    async def chat(
        self,
        messages: Sequence[Message],
        sampling_params: SamplingParams | None = None,
        **variables: Any,
    ) -> RequestOutput:
        """Answer one conversation; the whole answer at once."""
        text, ids = self._text.chat(messages, **variables)
        params = sampling_params or self._text.defaults()
        params = params.replace(output_kind=RequestOutputKind.FINAL_ONLY)
        prompt = {"prompt": text, "prompt_token_ids": ids}
        async for output in self.generate(prompt, params):
            if output.finished:
                return output
        raise RuntimeError("the request ended without an answer")

    async def check(self, form: StructuredOutputsParams) -> None:
        """Compile a schema or grammar ahead of its use. Raises ParameterError with what is wrong.

        `generate` does this by itself; once checked, the same form costs nothing there.
        """
        await self._requests.grammars.acheck(form)

    async def embed(
        self,
        prompt: str | Sequence[int],
        *,
        dimensions: int | None = None,
        truncate_prompt_tokens: int | None = None,
    ) -> EmbeddingRequestOutput:
        """The embedding of one text; texts of many callers are read together."""
        self._begin()
        pooler = pooler_for(self._ready, "embed")
        if dimensions is not None:
            check_dimensions(pooler, dimensions)
        text = Texts(self._text, self._ready, truncate_prompt_tokens, "prompt").one(prompt)
        handle = next(self._handles)
        waiting = asyncio.get_running_loop().create_future()
        self._vectors[handle] = waiting
        self._add(text.request(handle, str(handle), time.monotonic()))
        try:
            vector = embedding(await waiting, pooler, dimensions)
        finally:
            del self._vectors[handle]
            if waiting.cancelled():
                self._abort([handle])
        return EmbeddingRequestOutput(str(handle), EmbeddingOutput(vector.tolist()), list(text.ids))

    def _begin(self) -> None:
        if self._closed or self._failure is not None:
            raise RuntimeError(str(self._failure or "this AsyncLLM was closed; make a new one"))
        self._loop = self._loop or asyncio.get_running_loop()

    def _add(self, request: Any) -> None:
        self._inbox.put(lambda: self._core.add(request))

    def _abort(self, handles: list[int]) -> None:
        if handles:
            self._inbox.put(lambda: self._core.abort(handles))

    def _deliver(self, messages: list[Output]) -> None:
        for message in messages:
            for encoded in message.encoded:
                waiting = self._vectors.get(encoded.handle)
                if waiting is not None and not waiting.done():
                    waiting.set_result(encoded.vector)
            for finish in message.finished:
                waiting = self._vectors.get(finish.handle)
                if waiting is not None and finish.reason == "error" and not waiting.done():
                    waiting.set_exception(RuntimeError(finish.message))
            outputs, ended = self._requests.processor.process(message)
            self._abort(ended)
            for output in outputs:
                stream = self._streams.get(output.request_id)
                if stream is not None:
                    stream.put_nowait(output)

    def _fail(self, error: Exception) -> None:
        self._failure = error
        for stream in self._streams.values():
            stream.put_nowait(error)
        for waiting in self._vectors.values():
            if not waiting.done():
                waiting.set_exception(error)

    # --- the engine thread's side

    def _serve(self) -> None:
        try:
            while True:
                if not self._take():
                    return
                messages = self._core.turn()
                if messages and self._loop is not None:
                    self._loop.call_soon_threadsafe(self._deliver, messages)
        except Exception as error:
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self._fail, error)

    def _take(self) -> bool:
        """Do what was asked; wait for it when there is nothing else to do. False: close."""
        while True:
            try:
                job = self._inbox.get(block=not self._core.has_work())
            except queue.Empty:
                return True
            if job is None:
                return False
            job()

    # --- the end

    def close(self) -> None:
        """Stop the thread and free the device memory; twice is no error."""
        if not self._closed:
            self._closed = True
            self._inbox.put(None)
            self._thread.join()
            self._requests.grammars.close()
            self._core.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()
