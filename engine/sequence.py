"""A sequence: one prompt and one continuation of it, from arrival to its last token."""

from dataclasses import dataclass, field
from enum import Enum

import numpy as np

from octavo.engine.grammar.guide import Guide
from octavo.engine.messages import AddRequest
from octavo.engine.prefix import seed_hash
from octavo.engine.state import STOP_IDS


class Phase(Enum):
    """Where a sequence is."""

    COMPILING = "compiling"  # its grammar is being built; not in the queue yet
    WAITING = "waiting"  # in the queue, in no slot
    RUNNING = "running"  # in a slot
    STOPPING = "stopping"  # aborted, its stop not harvested yet: tokens are dropped
    PREEMPTING = "preempting"  # preempted, its stop not harvested yet: tokens still count
    DONE = "done"


@dataclass(eq=False, slots=True)
class Sequence:
    """One of a request's `n` sequences. `tokens` is current only while it is in no slot."""

    handle: int
    request: AddRequest
    choice: int
    serial: int  # order of arrival, unique
    tokens: np.ndarray  # i32[known] prompt and output so far
    prompt_len: int
    limit: int  # prompt and output together end here
    stop_ids: list[int]
    controls: np.ndarray  # f32[NS] see pallas_kernels.sampling.Controls
    seed: int = 0  # 64 bits
    kv_dtype: str = ""
    parent: "Sequence | None" = None  # choice 0 of the same request, until its prompt has run
    phase: Phase = Phase.WAITING
    lane: int = 0  # its data shard, for good
    slot: int = -1
    started: bool = False  # its Start was sent
    thought_over: bool = False  # the mark behind its thoughts was written
    failed_at: int = -1  # tokens known when a step last failed while it ran
    prompt_scored: int = 1  # prompt positions whose log probabilities were sent; the first has none
    hashes: list[bytes] = field(default_factory=list)
    root: bytes = b""  # the name of the empty prefix
    deadline: float = 0.0
    guide: Guide | None = None  # its place in its grammar, once that is compiled

    def __post_init__(self) -> None:
        self.prompt_scored = max(1, self.request.sampling.prompt_logprob_start or 0)
        self.root = seed_hash(self.request.cache_salt, 0, self.kv_dtype)

    @property
    def order(self) -> tuple[int, int]:
        """Who goes first: lower priority number, then earlier arrival."""
        return self.request.priority, self.serial

    @property
    def choosy(self) -> bool:
        """Needs more than the likeliest token of the logits as they come."""
        s = self.request.sampling
        edited = s.presence_penalty or s.frequency_penalty or s.repetition_penalty != 1.0
        return bool(not s.greedy or edited or s.logit_bias or s.min_tokens)

    @property
    def wants_logprobs(self) -> bool:
        """Log probabilities beside each output token."""
        sampling = self.request.sampling
        return sampling.logprobs is not None or bool(sampling.logprob_token_ids)

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Log probabilities of the prompt's own tokens."""
        sampling = self.request.sampling
        wanted = sampling.prompt_logprobs is not None or bool(sampling.prompt_logprob_token_ids)
        return wanted and self.choice == 0

    @property
    def masked(self) -> bool:
        """Needs a mask from the host before it is sampled."""
        sampling = self.request.sampling
        return bool(
            self.request.grammar
            or sampling.allowed_token_ids
            or self.request.bad_words
            or self.request.thought_end
            or (sampling.min_tokens and len(self.stop_ids) > STOP_IDS)
        )

    @property
    def min_tokens(self) -> int:
        """Tokens before which the device allows no end; beside a grammar the mask does that."""
        return 0 if self.request.grammar else self.request.sampling.min_tokens

    @property
    def reads_cache(self) -> bool:
        """Whether the prefix index may serve its prompt; scoring a prompt needs it run whole."""
        skip = self.request.sampling.skip_reading_prefix_cache
        return not (self.wants_prompt_logprobs if skip is None else skip)
