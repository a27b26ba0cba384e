"""Intake: checks what arrives against the engine's limits and makes sequences of it."""

import numpy as np

from octavo.engine.memory import Resolved
from octavo.engine.messages import AddRequest
from octavo.engine.sampling_params import SamplingParams
from octavo.engine.sequence import Sequence
from octavo.pallas_kernels.sampling import Controls


class Refused(ValueError):
    """A request that cannot be served: why, and what to do; `status` is HTTP's."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


class Intake:
    """Turns requests into sequences."""

    def __init__(self, resolved: Resolved, eos_token_ids: list[int], max_queued: int) -> None:
        self.resolved = resolved
        self.eos_token_ids = eos_token_ids
        self.max_queued = max_queued
        self.serials = 0  # sequences so far, those of all lanes

    def sequences(self, request: AddRequest, waiting: int) -> list[Sequence]:
        """The request's `n` sequences, behind so many others. Raises Refused in one sentence."""
        sampling, longest = request.sampling, self.resolved.max_model_len
        tokens = np.frombuffer(request.prompt, np.int32)
        if not len(tokens):
            raise Refused("the prompt is empty; send at least one token")
        if len(tokens) >= longest:
            raise Refused(
                f"the prompt has {len(tokens):,} tokens and the context is {longest:,}: "
                f"shorten it by {len(tokens) - longest + 1:,}, or raise --max-model-len"
            )
        vocab = self.resolved.dims.vocab
        if tokens.min() < 0 or tokens.max() >= vocab:
            bad = int(tokens.min() if tokens.min() < 0 else tokens.max())
            raise Refused(f"token id {bad} is outside the vocabulary of {vocab:,}")
        if waiting + sampling.n > self.max_queued:
            raise Refused(
                f"{waiting:,} requests wait already (max_num_queued_reqs is "
                f"{self.max_queued:,}); try again later",
                status=503,
            )
        self._check_ids(request, vocab)
        self._check_whole(request)
        limit = longest
        if sampling.max_tokens is not None:
            limit = min(longest, len(tokens) + sampling.max_tokens)
        return self._make(request, tokens, limit)

    def _make(self, request: AddRequest, tokens: np.ndarray, limit: int) -> list[Sequence]:
        sampling = request.sampling
        stops = list(dict.fromkeys(sampling.stop_token_ids))
        if not sampling.ignore_eos:
            stops = list(dict.fromkeys([*self.eos_token_ids, *stops]))
        seed = self._seed(sampling)
        out: list[Sequence] = []
        for choice in range(sampling.n):
            self.serials += 1
            out.append(
                Sequence(
                    handle=request.handle + choice,
                    request=request,
                    choice=choice,
                    serial=self.serials,
                    tokens=tokens,
                    prompt_len=len(tokens),
                    limit=limit,
                    stop_ids=stops,
                    controls=_controls(sampling, choice),
                    seed=seed,
                    kv_dtype=self.resolved.kv_dtype.name,
                    parent=out[0] if out else None,
                    deadline=request.arrival + request.timeout if request.timeout else 0.0,
                )
            )
        return out

    def _check_whole(self, request: AddRequest) -> None:
        """What a client makes of a wish must have come with it."""
        if request.sampling.structured_outputs is not None:
            raise Refused("`structured_outputs` came without the grammar that a client makes of it")
        budget = request.sampling.thinking_token_budget
        if budget is not None and budget >= 0 and not request.thought_end:
            raise Refused(
                "`thinking_token_budget` needs a model whose thoughts are told apart from its "
                "answers: leave it out"
            )

    def _seed(self, sampling: SamplingParams) -> int:
        """A request without a seed gets one of its own, from the engine's and its place in line."""
        if sampling.seed is not None:
            return sampling.seed
        mixed = (self.resolved.config.seed << 32) ^ (self.serials + 1) * 0x9E3779B97F4A7C15
        return mixed & (2**64 - 1)

    def _check_ids(self, request: AddRequest, vocab: int) -> None:
        sampling = request.sampling
        ids = {
            "allowed_token_ids": sampling.allowed_token_ids or (),
            "logit_bias": sampling.logit_bias or (),
            "logprob_token_ids": sampling.logprob_token_ids or (),
            "prompt_logprob_token_ids": sampling.prompt_logprob_token_ids or (),
            "stop_token_ids": sampling.stop_token_ids,
            "bad_words": [i for word in request.bad_words for i in word],
            "thinking_token_budget": request.thought_end,
        }
        for name, given in ids.items():
            for token in given:
                if not 0 <= token < vocab:
                    raise Refused(f"`{name}` names token {token}, outside the {vocab:,} there are")


def _controls(sampling: SamplingParams, choice: int) -> np.ndarray:
    """The request's row of SlotState.sampling."""
    return Controls.pack(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        repetition=sampling.repetition_penalty,
        presence=sampling.presence_penalty,
        frequency=sampling.frequency_penalty,
        top_k=sampling.top_k,
        choice=choice,
    )
