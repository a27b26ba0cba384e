"""What a caller gets back. Shaped so that code written for vLLM's outputs reads these."""

import msgspec


class Logprob(msgspec.Struct, gc=False):
    """One token's log probability at one position."""

    logprob: float
    rank: int | None = None  # 1 is the likeliest
    decoded_token: str | None = None


PositionLogprobs = dict[int, Logprob]  # token id -> its entry; the chosen token is first


class CompletionOutput(msgspec.Struct):
    """One sequence of a request; with output kind DELTA, what is new of it."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[PositionLogprobs] | None = None  # one per token of `token_ids`
    finish_reason: str | None = None  # stop, length, abort, error, repetition; None: goes on
    stop_reason: int | str | None = None  # the stop token or stop string that ended it

    def finished(self) -> bool:
        """No more tokens will come."""
        return self.finish_reason is not None


class RequestMetrics(msgspec.Struct):
    """When things happened, in seconds of time.monotonic; 0.0 is not yet."""

    arrival_time: float = 0.0
    scheduled_time: float = 0.0
    first_token_time: float = 0.0
    last_token_time: float = 0.0
    finished_time: float = 0.0
    generation_tokens: int = 0

    @property
    def time_to_first_token(self) -> float:
        """Seconds from arrival, as this process saw it."""
        return self.first_token_time - self.arrival_time if self.first_token_time else 0.0


class RequestOutput(msgspec.Struct):
    """One request, as far as it has come."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int] | None
    prompt_logprobs: list[PositionLogprobs | None] | None
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics | None = None
    num_cached_tokens: int | None = None  # prompt tokens found in the prefix cache
    error: str = ""  # why the request failed, one sentence; empty: it did not
    status: int = 200  # the HTTP status that goes with `error`


class EmbeddingOutput(msgspec.Struct):
    """One embedding."""

    embedding: list[float]

    @property
    def hidden_size(self) -> int:
        """How many numbers it has."""
        return len(self.embedding)


class EmbeddingRequestOutput(msgspec.Struct):
    """One text and its embedding."""

    request_id: str
    outputs: EmbeddingOutput
    prompt_token_ids: list[int]
    finished: bool = True


class ScoringOutput(msgspec.Struct):
    """One score."""

    score: float


class ScoringRequestOutput(msgspec.Struct):
    """One pair and its score."""

    request_id: str
    outputs: ScoringOutput
    prompt_token_ids: list[int]  # of the pair; where the score is a cosine, of its second text
    finished: bool = True
