"""From a caller's prompts to the engine's messages; what LLM and AsyncLLM share."""

import itertools
import time
from collections.abc import Mapping, Sequence
from typing import Any

from octavo.engine.config import EngineConfig
from octavo.engine.grammar.checker import Checker
from octavo.engine.grammar.vocabulary import Vocabulary
from octavo.engine.messages import AddRequest, Ready
from octavo.engine.sampling_params import SamplingParams
from octavo.engine.text.generation import RequestLimits, make_request
from octavo.engine.text.opened import ModelText
from octavo.engine.text.processor import OutputProcessor

# Text, token ids, or a dictionary with "prompt" or "prompt_token_ids".
Prompt = str | Sequence[int] | Mapping[str, Any]


class Requests:
    """Numbers, checks and registers requests."""

    def __init__(self, config: EngineConfig, text: ModelText, ready: Ready) -> None:
        self.text = text
        self.processor = OutputProcessor(text.tokenizer)
        self.limits = RequestLimits(
            max_model_len=ready.max_model_len,
            vocab_size=ready.vocab_size,
            eos_token_ids=tuple(ready.eos_token_ids),
            max_logprobs=config.max_logprobs,
        )
        self.grammars = Checker(
            lambda: Vocabulary.of(text.tokenizer, ready.vocab_size, ready.eos_token_ids),
            config.grammar_time_limit,
        )
        self._handles = itertools.count(1)
        self._names = itertools.count()

    def prepare(
        self,
        prompt: Prompt,
        params: SamplingParams | None,
        *,
        request_id: str = "",
        priority: int = 0,
        cache_salt: str = "",
        timeout: float = 0.0,
    ) -> AddRequest:
        """Tokenize and check; the processor then expects its outputs. Raises ValueError."""
        words, ids = self.read(prompt)
        params = params or self.text.defaults()
        name = request_id or str(next(self._names))
        handle = next(self._handles)
        for _ in range(params.n - 1):
            next(self._handles)
        arrival = time.monotonic()
        message = make_request(
            handle=handle,
            request_id=name,
            prompt_token_ids=ids,
            params=params,
            limits=self.limits,
            tokenizer=self.text.tokenizer,
            priority=priority,
            arrival=arrival,
            cache_salt=cache_salt,
            timeout=timeout,
            grammar=self.grammars.check,
        )
        self.processor.add(name, handle, params.n, words, ids, params, arrival)
        return message

    def read(self, prompt: Prompt) -> tuple[str | None, Sequence[int]]:
        """A prompt's text (where it has one) and token ids."""
        if isinstance(prompt, Mapping):
            if prompt.get("prompt_token_ids") is not None:
                return prompt.get("prompt"), prompt["prompt_token_ids"]
            if isinstance(prompt.get("prompt"), str):
                return prompt["prompt"], self.text.encode(prompt["prompt"])
            raise ValueError('a prompt needs "prompt" (text) or "prompt_token_ids" (a list)')
        if isinstance(prompt, str):
            return prompt, self.text.encode(prompt)
        return None, prompt


def as_list(prompts: Any) -> list[Prompt]:
    """One prompt or many: a list of ints is one prompt of token ids."""
    if isinstance(prompts, str | Mapping):
        return [prompts]
    prompts = list(prompts)
    if prompts and all(isinstance(p, int) for p in prompts):
        return [prompts]
    return prompts


def spread(params: Any, count: int) -> list[SamplingParams | None]:
    """One SamplingParams for all prompts, or one each."""
    if isinstance(params, Sequence):
        if len(params) != count:
            raise ValueError(
                f"`sampling_params` has {len(params)} entries for {count} prompts: "
                "give one for all, or one each"
            )
        return list(params)
    return [params] * count
