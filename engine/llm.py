"""LLM: the engine in the caller's process.

from octavo import LLM, SamplingParams
llm = LLM("smollm2-135m")
print(llm.generate("The capital of France is", SamplingParams(temperature=0))[0].outputs[0].text)
"""

from collections import deque
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Self

import numpy as np

from octavo.engine.assemble import open_model
from octavo.engine.config import ConfigError, EngineConfig
from octavo.engine.core import EngineCore
from octavo.engine.embedder import Embedder
from octavo.engine.progress import Bar, startup_progress
from octavo.engine.requests import Prompt, Requests, as_list, spread
from octavo.engine.runner import choose_runner
from octavo.engine.sampling_params import RequestOutputKind, SamplingParams
from octavo.engine.text.opened import Message, open_text
from octavo.engine.text.outputs import (
    EmbeddingRequestOutput,
    RequestOutput,
    ScoringRequestOutput,
)
from octavo.engine.text.tokenizer import Tokenizer
from octavo.models.sources.orbax import save as save_orbax


class RequestError(RuntimeError):
    """A request that the engine could not serve: one sentence why."""


class LLM:
    """One model, loaded and compiled. Not thread-safe; `AsyncLLM` is for many callers."""

    def __init__(
        self,
        model: str = "smollm2-135m",
        *,
        quiet: bool = False,
        chat_template: str = "",
        **settings: Any,
    ) -> None:
        """`settings` are EngineConfig's fields. `quiet` shows no progress. Raises ConfigError."""
        self.config = EngineConfig(model=model, **settings)
        self.config.validate()
        self._text = open_text(self.config, chat_template)
        self._core: EngineCore | None = None
        self._embedder: Embedder | None = None
        reads = choose_runner(self.config) == "pooling"
        with startup_progress(quiet) as progress:
            if reads:
                self._embedder = Embedder(self.config, self._text, progress)
                ready = self._embedder.ready
            else:
                self._core = EngineCore(self.config, progress=progress)
                ready = self._core.ready()
        self._requests = Requests(self.config, self._text, ready)
        self._waiting: dict[str, deque[RequestOutput]] = {}
        self._closed = False

    # --- generation

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Continue every prompt; outputs in the order of the prompts.

        Without sampling_params the model's own defaults count. Raises ValueError for a prompt or a
        parameter that cannot work, before anything runs, and RequestError where the engine failed.
        """
        wanted = as_list(prompts)
        params = spread(sampling_params, len(wanted))
        ranks = list(priority) if priority is not None else [0] * len(wanted)
        jobs = [
            (prompt, self._kind(one, RequestOutputKind.FINAL_ONLY), rank)
            for prompt, one, rank in zip(wanted, params, ranks, strict=True)
        ]
        return self._run(jobs, use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation or several, through the model's chat template."""
        self._check_generates()
        single = bool(messages) and isinstance(messages[0], Mapping)
        chats: Any = [messages] if single else messages
        prompts: list[Prompt] = []
        for chat in chats:
            text, ids = self._text.chat(
                chat,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tools=tools,
                **(chat_template_kwargs or {}),
            )
            prompts.append({"prompt": text, "prompt_token_ids": ids})
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def stream(
        self,
        prompt: Prompt | Sequence[Message],
        sampling_params: SamplingParams | None = None,
    ) -> Generator[RequestOutput]:
        """Outputs as they come, each with what is new. A list of messages is a conversation.

        Leaving the loop aborts the request.
        """
        self._check_generates()
        if isinstance(prompt, Sequence) and prompt and isinstance(prompt[0], Mapping):
            text, ids = self._text.chat(prompt)  # type: ignore[arg-type]
            prompt = {"prompt": text, "prompt_token_ids": ids}
        name = self._submit(prompt, self._kind(sampling_params, RequestOutputKind.DELTA), 0)  # type: ignore[arg-type]
        return self._follow(name)

    def _follow(self, name: str) -> Generator[RequestOutput]:
        queue = self._waiting[name]
        try:
            while True:
                while not queue:
                    self._turn()
                output = queue.popleft()
                _check(output)
                yield output
                if output.finished:
                    return
        finally:
            self._waiting.pop(name, None)
            self.core.abort(self._requests.processor.abort(name))

    def _kind(self, params: SamplingParams | None, kind: RequestOutputKind) -> SamplingParams:
        return (params or self._text.defaults()).replace(output_kind=kind)

    def _submit(self, prompt: Prompt, params: SamplingParams, priority: int) -> str:
        self._check_generates()
        request = self._requests.prepare(prompt, params, priority=priority)
        self._waiting[request.request_id] = deque()
        self.core.add(request)
        return request.request_id

    def _check_generates(self) -> None:
        if self._closed:
            raise RuntimeError("this LLM was closed; make a new one")
        if self._core is None:
            raise ConfigError(
                f"the model `{self.config.model}` reads texts and generates none",
                "use embed, encode or score; or the runner `generate`, where the model can",
            )

    def _run(
        self, jobs: list[tuple[Prompt, SamplingParams, int]], use_tqdm: bool
    ) -> list[RequestOutput]:
        names: list[str] = []
        done: dict[str, RequestOutput] = {}
        try:
            for prompt, params, rank in jobs:
                names.append(self._submit(prompt, params, rank))
            with Bar("generating", len(names), show=use_tqdm) as bar:
                while len(done) < len(names):
                    for name, output in self._turn():
                        if output.finished and name in self._waiting:
                            _check(output)
                            done[name] = output
                            tokens = sum(len(o.token_ids) for o in output.outputs)
                            bar.advance(tokens)
        finally:
            for name in names:
                self._waiting.pop(name, None)
                self.core.abort(self._requests.processor.abort(name))
        return [done[name] for name in names]

    def _turn(self) -> list[tuple[str, RequestOutput]]:
        """One turn of the engine; outputs go to whoever waits for them, and are returned too."""
        got: list[tuple[str, RequestOutput]] = []
        for message in self.core.turn():
            outputs, ended = self._requests.processor.process(message)
            self.core.abort(ended)
            for output in outputs:
                got.append((output.request_id, output))
                queue = self._waiting.get(output.request_id)
                if queue is not None:
                    queue.append(output)
        return got

    # --- embeddings and scores, of a model that reads

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        use_tqdm: bool = True,
        dimensions: int | None = None,
        truncate_prompt_tokens: int | None = None,
    ) -> list[EmbeddingRequestOutput]:
        """One embedding per prompt, as the model means it to be pooled and normalized.

        `dimensions` keeps that many numbers; longer prompts than the model takes are refused unless
        `truncate_prompt_tokens` says how much of them to read (-1: all that fits).
        """
        return self._reading().embed(
            prompts, dimensions=dimensions, truncate=truncate_prompt_tokens, show=use_tqdm
        )

    def encode(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        normalize: bool | None = None,
        dimensions: int | None = None,
        truncate_prompt_tokens: int | None = None,
    ) -> np.ndarray:
        """As `embed`, as one array f32[n, E]; None normalizes where the model means that."""
        return self._reading().encode(
            prompts, normalize=normalize, dimensions=dimensions, truncate=truncate_prompt_tokens
        )[0]

    def score(
        self,
        text_1: str | Sequence[str],
        text_2: str | Sequence[str],
        *,
        use_tqdm: bool = True,
        truncate_prompt_tokens: int | None = None,
    ) -> list[ScoringRequestOutput]:
        """How well pairs go together: one text with many, or each with its own."""
        return self._reading().score(text_1, text_2, truncate=truncate_prompt_tokens, show=use_tqdm)

    def _reading(self) -> Embedder:
        if self._closed:
            raise RuntimeError("this LLM was closed; make a new one")
        if self._embedder is None:
            raise ConfigError(
                f"the model `{self.config.model}` generates text here, and gives no embeddings",
                'LLM(..., runner="pooling") reads with it',
            )
        return self._embedder

    # --- facts

    def get_tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer; None where it has none."""
        return self._text.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What a request gets that brings no parameters."""
        return self._text.defaults()

    @property
    def core(self) -> EngineCore:
        """The engine itself, where it generates."""
        assert self._core is not None, f"{self.config.model=} reads"
        return self._core

    @property
    def vocab_size(self) -> int:
        """V."""
        return self._requests.limits.vocab_size

    def save(self, folder: str | Path) -> Path:
        """Write the loaded model to a new folder, which starts faster than what it came from.

        The weights are kept in their final layout and dtype, with tokenizer and template beside
        them; `LLM(folder)` and `octavo serve FOLDER` take it. Raises CheckpointError.
        """
        with closing(open_model(self.config)) as checkpoint:
            params = self._embedder.core.params if self._embedder else self.core.device.params
            return save_orbax(params, checkpoint, folder)

    def close(self) -> None:
        """Free the device memory; twice is no error."""
        if not self._closed:
            self._closed = True
            if self._embedder is None:
                self._requests.grammars.close()
                self.core.close()
            else:
                self._embedder.core.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _check(output: RequestOutput) -> None:
    if output.error:
        raise RequestError(output.error)
