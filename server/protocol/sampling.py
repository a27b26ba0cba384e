"""The fields that every generating request has in common, and the SamplingParams they make."""

from typing import Any, ClassVar

import msgspec

from octavo.engine.sampling_params import (
    ParameterError,
    RepetitionDetectionParams,
    RequestOutputKind,
    SamplingParams,
    default_fields,
)
from octavo.server.protocol.errors import ApiError, bad_request, not_yet
from octavo.server.protocol.structured import asked_form

MAX_STOP_STRINGS = 4


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class GenerationRequest(msgspec.Struct, kw_only=True):
    """None means not given: the model's own default comes next, then SamplingParams' default."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    prompt_logprobs: int | None = None
    prompt_logprob_token_ids: list[int] | None = None
    prompt_logprob_start: int | None = None
    logprob_token_ids: list[int] | None = None
    logit_bias: dict[str, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    detokenize: bool | None = None
    stream_interval: int | None = None
    skip_reading_prefix_cache: bool | None = None
    watermarking: bool | None = None
    vllm_xargs: dict[str, Any] | None = None

    # The form of the text: one of them. See octavo.server.protocol.structured.
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    guided_whitespace_pattern: str | None = None

    # Of the request, not of sampling.
    user: str | None = None
    priority: int | None = None
    request_id: str | None = None
    cache_salt: str | None = None
    timeout: float | None = None  # seconds from its arrival, then 408
    echo: bool | None = None
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: int | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None

    # Known and refused: to ignore them would answer another question than the one asked.
    prompt_embeds: Any = None
    thinking_token_budget: int | None = None
    repetition_detection: RepetitionDetectionParams | None = None
    use_beam_search: bool | None = None
    kv_transfer_params: Any = None

    TO_SAMPLING: ClassVar[tuple[str, ...]] = (
        "n", "min_tokens", "temperature", "top_p", "top_k", "min_p", "presence_penalty",
        "frequency_penalty", "repetition_penalty", "seed", "stop", "stop_token_ids",
        "include_stop_str_in_output", "ignore_eos", "prompt_logprobs", "prompt_logprob_token_ids",
        "prompt_logprob_start", "logprob_token_ids", "logit_bias", "allowed_token_ids", "bad_words",
        "skip_special_tokens", "spaces_between_special_tokens", "detokenize", "stream_interval",
        "skip_reading_prefix_cache", "watermarking", "repetition_detection",
    )  # fmt: skip

    def check(self) -> None:
        """Refuse, by name, what cannot be served."""
        asked_form(self)
        for field in ("prompt_embeds", "kv_transfer_params"):
            if getattr(self, field):
                raise not_yet(field, "leave it out")
        if self.thinking_token_budget is not None:
            raise not_yet("thinking_token_budget", "use `max_tokens`")
        if self.use_beam_search:
            raise not_yet("use_beam_search", "use `n` with a `temperature` above 0")
        if self.stream_options is not None and not self.stream:
            raise bad_request("`stream_options` needs `stream` to be true", "stream_options")
        if isinstance(self.stop, list) and len(self.stop) > MAX_STOP_STRINGS:
            raise bad_request(
                f"`stop` takes at most {MAX_STOP_STRINGS} strings, got {len(self.stop)}", "stop"
            )

    def sampling(self, generation_config: dict[str, Any], **values: Any) -> SamplingParams:
        """SamplingParams of this body; `values` are what chat and completions spell differently."""
        given = {k: v for k in self.TO_SAMPLING if (v := getattr(self, k)) is not None}
        if self.vllm_xargs:
            given["extra_args"] = self.vllm_xargs
        given["structured_outputs"] = asked_form(self)[1]
        fields = default_fields(generation_config) | given
        fields |= {k: v for k, v in values.items() if v is not None or k not in fields}
        try:
            return SamplingParams(**fields, output_kind=RequestOutputKind.DELTA)
        except ParameterError as error:
            raise bad_request(str(error), error.parameter) from None

    @property
    def form_field(self) -> str:
        """The field by which this body asks for a form of the text."""
        return asked_form(self)[0]

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        """Usage beside every chunk, asked for together with the usage at the end."""
        return self.include_usage and bool(
            self.stream_options and self.stream_options.continuous_usage_stats
        )


class Usage(msgspec.Struct):
    prompt_tokens: int = 0
    total_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: dict[str, int] | None = None
    completion_tokens_details: dict[str, int] | msgspec.UnsetType = msgspec.UNSET


def usage_of(
    prompt_tokens: int,
    completion_tokens: int,
    cached_tokens: int = 0,
    reasoning_tokens: int | None = None,
) -> Usage:
    usage = Usage(prompt_tokens, prompt_tokens + completion_tokens, completion_tokens)
    if cached_tokens:
        usage.prompt_tokens_details = {"cached_tokens": cached_tokens}
    if reasoning_tokens is not None:
        usage.completion_tokens_details = {"reasoning_tokens": reasoning_tokens}
    return usage


def check_logprobs(name: str, asked: int | None, limit: int) -> None:
    """ApiError when more log probabilities are asked for than the server gives."""
    if asked is not None and limit >= 0 and asked > limit:
        raise bad_request(f"`{name}` must be at most {limit}, got {asked}", name)


__all__ = ["ApiError", "GenerationRequest", "StreamOptions", "Usage", "check_logprobs", "usage_of"]
