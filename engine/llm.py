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
from octavo.engine.config import EngineConfig
from octavo.engine.core import EngineCore
from octavo.engine.encoder import Encoder
from octavo.engine.progress import Bar, startup_progress
from octavo.engine.requests import Prompt, Requests, as_list, spread
from octavo.engine.sampling_params import RequestOutputKind, SamplingParams
from octavo.engine.text.opened import Message, open_text
from octavo.engine.text.outputs import RequestOutput
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
        with startup_progress(quiet) as progress:
            self._core = EngineCore(self.config, progress=progress)
        self._requests = Requests(self.config, self._text, self._core.ready())
        self._waiting: dict[str, deque[RequestOutput]] = {}
        self._encoder: Encoder | None = None
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
            self._core.abort(self._requests.processor.abort(name))

    def _kind(self, params: SamplingParams | None, kind: RequestOutputKind) -> SamplingParams:
        return (params or self._text.defaults()).replace(output_kind=kind)

    def _submit(self, prompt: Prompt, params: SamplingParams, priority: int) -> str:
        if self._closed:
            raise RuntimeError("this LLM was closed; make a new one")
        request = self._requests.prepare(prompt, params, priority=priority)
        self._waiting[request.request_id] = deque()
        self._core.add(request)
        return request.request_id

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
                self._core.abort(self._requests.processor.abort(name))
        return [done[name] for name in names]

    def _turn(self) -> list[tuple[str, RequestOutput]]:
        """One turn of the engine; outputs go to whoever waits for them, and are returned too."""
        got: list[tuple[str, RequestOutput]] = []
        for message in self._core.turn():
            outputs, ended = self._requests.processor.process(message)
            self._core.abort(ended)
            for output in outputs:
                got.append((output.request_id, output))
                queue = self._waiting.get(output.request_id)
                if queue is not None:
                    queue.append(output)
        return got

    # --- embeddings

    def encode(
        self, prompts: Prompt | Sequence[Prompt], *, pooling: str = "last", normalize: bool = True
    ) -> np.ndarray:
        """One vector per prompt, f32[n, E]: the last token's hidden state, or the mean of all."""
        if self._encoder is None:
            resolved = self._core.resolved
            self._encoder = Encoder(resolved.model, self._core.device.params, resolved.dtype)
        ids = [self._requests.read(prompt)[1] for prompt in as_list(prompts)]
        return self._encoder(ids, pooling=pooling, normalize=normalize)

    # --- facts

    def get_tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer; None where it has none."""
        return self._text.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What a request gets that brings no parameters."""
        return self._text.defaults()

    @property
    def core(self) -> EngineCore:
        """The engine itself."""
        return self._core

    @property
    def vocab_size(self) -> int:
        """V."""
        return self._core.resolved.dims.vocab

    def save(self, folder: str | Path) -> Path:
        """Write the loaded model to a new folder, which starts faster than what it came from.

        The weights are kept in their final layout and dtype, with tokenizer and template beside
        them; `LLM(folder)` and `octavo serve FOLDER` take it. Raises CheckpointError.
        """
        with closing(open_model(self.config)) as checkpoint:
            return save_orbax(self._core.device.params, checkpoint, folder)

    def close(self) -> None:
        """Free the device memory; twice is no error."""
        if not self._closed:
            self._closed = True
            self._requests.grammars.close()
            self._core.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _check(output: RequestOutput) -> None:
    if output.error:
        raise RequestError(output.error)
