"""From a prompt and its sampling parameters to the message that the engine takes.

All that depends on the model and can be wrong in a request is checked here, in the process that the
client talks to, so that the engine's loop meets only what it can serve.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from octavo.engine.messages import AddRequest
from octavo.engine.sampling_params import (
    ParameterError,
    SamplingParams,
    StructuredOutputsParams,
    default_fields,
)
from octavo.engine.text.tokenizer import Tokenizer
from octavo.models.checkpoint import Checkpoint


@dataclass(frozen=True, kw_only=True)
class RequestLimits:
    """What the engine can serve; from its `Ready` message and its configuration."""

    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...] = ()
    max_logprobs: int = 20  # -1 allows the whole vocabulary


def eos_token_ids(checkpoint: Checkpoint, tokenizer: Tokenizer | None = None) -> list[int]:
    """Tokens that end a generation: generation_config, else config, and the tokenizer's own."""
    found = _ids(checkpoint.generation_config.get("eos_token_id"))
    if not found:
        found = _ids(checkpoint.config.get("eos_token_id"))
    if tokenizer is not None and tokenizer.eos_id is not None:
        found.append(tokenizer.eos_id)
    return list(dict.fromkeys(found))


def default_sampling_params(generation_config: Mapping[str, Any]) -> SamplingParams:
    """What a request that asks for nothing gets: the model's own defaults over ours."""
    return SamplingParams(**default_fields(dict(generation_config)))


def make_request(
    *,
    handle: int,
    request_id: str,
    prompt_token_ids: Sequence[int],
    params: SamplingParams,
    limits: RequestLimits,
    tokenizer: Tokenizer | None = None,
    priority: int = 0,
    arrival: float = 0.0,
    cache_salt: str = "",
    timeout: float = 0.0,
    grammar: Callable[[StructuredOutputsParams], str] | None = None,
    mask_after: Sequence[int] = (),
    thought_end: Sequence[int] = (),
) -> AddRequest:
    """The checked message; `max_tokens` is cut to the context. Raises ParameterError.

    `grammar` (Checker.check) makes a grammar's text of structured_outputs: at once where that was
    checked before, else it blocks. The grammar begins behind the tokens `mask_after`.
    """
    prompt = _prompt(prompt_token_ids, limits)
    _check_tokens(params, limits)
    room = limits.max_model_len - len(prompt)
    max_tokens = room if params.max_tokens is None else min(params.max_tokens, room)
    changes: dict[str, Any] = {}
    if max_tokens != params.max_tokens:
        changes = {"max_tokens": max_tokens, "min_tokens": min(params.min_tokens, max_tokens)}
    own_eos = tokenizer.eos_id if tokenizer is not None else None
    if own_eos is not None and not params.ignore_eos and own_eos not in limits.eos_token_ids:
        if own_eos not in params.stop_token_ids:
            changes["stop_token_ids"] = [*params.stop_token_ids, own_eos]
    words = []
    if params.bad_words:
        if tokenizer is None:
            raise ParameterError("bad_words", "needs a tokenizer, and this model has none")
        words = tokenized_words(params.bad_words, tokenizer)
    text = ""
    if params.structured_outputs is not None:
        if grammar is None:
            raise ParameterError("structured_outputs", "is not served here; leave it out")
        text = grammar(params.structured_outputs)
        changes["structured_outputs"] = None  # the text says it all
    return AddRequest(
        handle=handle,
        request_id=request_id,
        prompt=prompt.tobytes(),
        sampling=params.replace(**changes) if changes else params,
        bad_words=words,
        priority=priority,
        arrival=arrival,
        cache_salt=cache_salt,
        timeout=timeout,
        grammar=text,
        mask_after=list(mask_after) if text else [],
        thought_end=list(thought_end) if (params.thinking_token_budget or 0) >= 0 else [],
    )


def tokenized_words(words: Iterable[str], tokenizer: Tokenizer) -> list[list[int]]:
    """Each word's tokens at the beginning of a text and after a space, where they differ."""
    found: list[list[int]] = []
    for word in words:
        bare = word.lstrip()
        for text in (bare, " " + bare):
            ids = tokenizer.encode(text, add_special_tokens=False)
            if ids and ids not in found:
                found.append(ids)
    return found


def _prompt(token_ids: Sequence[int], limits: RequestLimits) -> np.ndarray:
    """i32[prompt_len], checked against the context and the vocabulary."""
    count, context = len(token_ids), limits.max_model_len
    if count == 0:
        raise ParameterError("prompt", "must hold at least one token, got none")
    if count >= context:
        raise ParameterError(
            "prompt",
            f"has {count} tokens, the context is {context}: shorten it by {count - context + 1}, "
            "or start with a larger --max-model-len",
        )
    try:
        prompt = np.asarray(token_ids, dtype=np.int64)
    except (TypeError, ValueError, OverflowError):
        raise ParameterError("prompt", "must be a list of integers where it is token ids") from None
    low, high = int(prompt.min()), int(prompt.max())
    if low < 0 or high >= limits.vocab_size:
        raise ParameterError(
            "prompt",
            f"has token id {low if low < 0 else high}, "
            f"the vocabulary is 0 to {limits.vocab_size - 1}",
        )
    return prompt.astype("<i4")


def _check_tokens(params: SamplingParams, limits: RequestLimits) -> None:
    """Token ids within the vocabulary, log probabilities within what the engine was started for."""
    named: dict[str, Iterable[int]] = {
        "logit_bias": params.logit_bias or (),
        "allowed_token_ids": params.allowed_token_ids or (),
        "logprob_token_ids": params.logprob_token_ids or (),
        "prompt_logprob_token_ids": params.prompt_logprob_token_ids or (),
        "stop_token_ids": params.stop_token_ids,
    }
    for name, ids in named.items():
        for token in ids:
            if token >= limits.vocab_size:
                raise ParameterError(
                    name, f"has token id {token}, the vocabulary is 0 to {limits.vocab_size - 1}"
                )
    if limits.max_logprobs < 0:
        return
    for name, k in (("logprobs", params.logprobs), ("prompt_logprobs", params.prompt_logprobs)):
        if k is None:
            continue
        wanted = limits.vocab_size if k == -1 else k
        if wanted > limits.max_logprobs:
            raise ParameterError(
                name,
                f"must be at most {limits.max_logprobs}, got {k}: "
                "ask for fewer, or start with a larger --max-logprobs",
            )


def _ids(value: Any) -> list[int]:
    if value is None:
        return []
    return [int(v) for v in value] if isinstance(value, list | tuple) else [int(value)]
