"""SamplingParams: what a request asks of sampling, with the names and limits of the field. No jax.

A `SamplingParams` is checked when it is made and never changes after that: whoever holds one need
not check it again. What depends on a model (its vocabulary, its context, its end tokens) is checked
in `engine/text/generation.py`.
"""

import enum
import logging
import math
from typing import Any, Self

import msgspec
from msgspec.structs import force_setattr

logger = logging.getLogger(__name__)

GREEDY_BELOW = 1e-5  # a smaller temperature means the likeliest token
LOWEST_TEMPERATURE = 0.01  # smaller ones overflow once logits are divided by them
MAX_SEQUENCES = 16384
MAX_LOGIT_BIAS = 256
MAX_BAD_WORDS = 128
MAX_LOGPROB_TOKEN_IDS = 128
INT64 = 2**63


class ParameterError(ValueError):
    """A sampling parameter that cannot work; the message names it."""

    def __init__(self, parameter: str, problem: str) -> None:
        super().__init__(f"`{parameter}` {problem}")
        self.parameter, self.problem = parameter, problem


class RequestOutputKind(enum.IntEnum):
    """What each `RequestOutput` of a stream holds."""

    CUMULATIVE = 0  # everything so far
    DELTA = 1  # what is new
    FINAL_ONLY = 2  # nothing until the end, then everything


class StructuredOutputsParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The shape that the text must have: exactly one of the first six."""

    json: str | dict[str, Any] | None = None  # a JSON schema
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None  # any JSON object
    structural_tag: str | None = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    whitespace_pattern: str | None = None

    def __post_init__(self) -> None:
        kinds = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")
        given = [kind for kind in kinds if getattr(self, kind) not in (None, False)]
        if len(given) != 1:
            found = " and ".join(given) if given else "none"
            raise ParameterError(
                "structured_outputs", f"takes exactly one of {', '.join(kinds)}, got {found}"
            )
        if self.choice is not None and not self.choice:
            raise ParameterError("structured_outputs", "needs at least one `choice`, got none")


class RepetitionDetectionParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Stop when the last tokens are one pattern, `min_count` times over."""

    max_pattern_size: int = 0  # tokens in the longest pattern looked for; 0 is off
    min_pattern_size: int = 1
    min_count: int = 2

    def __post_init__(self) -> None:
        name = "repetition_detection"
        if self.max_pattern_size < 0:
            raise ParameterError(
                name, f"`max_pattern_size` must be at least 0, got {self.max_pattern_size}"
            )
        if self.max_pattern_size == 0:
            return
        if not 1 <= self.min_pattern_size <= self.max_pattern_size:
            raise ParameterError(
                name,
                f"`min_pattern_size` must be from 1 to `max_pattern_size` "
                f"({self.max_pattern_size}), got {self.min_pattern_size}",
            )
        if self.min_count < 2:
            raise ParameterError(name, f"`min_count` must be at least 2, got {self.min_count}")


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How the tokens of one request are chosen, when they end and what is told about them."""

    n: int = 1
    presence_penalty: float = 0.0  # over generated tokens
    frequency_penalty: float = 0.0  # over generated tokens
    repetition_penalty: float = 1.0  # over prompt and generated tokens
    temperature: float = 1.0  # below 1e-5 is greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 and -1 are off
    min_p: float = 0.0
    seed: int | None = None
    stop: list[str] | str | None = []  # always a list once made: see `stop_strings`
    stop_token_ids: list[int] = []
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    max_tokens: int | None = 16  # None runs to the end of the context
    min_tokens: int = 0
    logprobs: int | None = None  # -1 is the whole vocabulary
    prompt_logprobs: int | None = None
    prompt_logprob_token_ids: list[int] | None = None
    prompt_logprob_start: int | None = None
    logprob_token_ids: list[int] | None = None
    flat_logprobs: bool = False
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    stream_interval: int | None = None  # tokens between two outputs of a stream
    structured_outputs: StructuredOutputsParams | None = None
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] = []
    thinking_token_budget: int | None = None  # -1 is unlimited
    repetition_detection: RepetitionDetectionParams | None = None
    skip_reading_prefix_cache: bool | None = None
    watermarking: bool | None = None
    extra_args: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        self._normalize()
        self._check_numbers()
        self._check_lengths()
        self._check_stops()
        self._check_tokens()
        if self.greedy:
            if self.n > 1:
                raise ParameterError(
                    "n", f"must be 1 when `temperature` is 0, got {self.n}: all would be the same"
                )
            for name, off in (("top_p", 1.0), ("top_k", 0), ("min_p", 0.0)):
                force_setattr(self, name, off)
        elif self.temperature < LOWEST_TEMPERATURE:
            logger.warning(
                "`temperature` %s is raised to %s; 0 is greedy",
                self.temperature,
                LOWEST_TEMPERATURE,
            )
            force_setattr(self, "temperature", LOWEST_TEMPERATURE)

    @property
    def greedy(self) -> bool:
        """The likeliest token is taken; nothing is drawn."""
        return self.temperature < GREEDY_BELOW

    @property
    def stop_strings(self) -> list[str]:
        """`stop` as the list that it is once made."""
        return self.stop if isinstance(self.stop, list) else []

    @classmethod
    def from_optional(
        cls, generation_config: dict[str, Any] | None = None, **given: Any
    ) -> "SamplingParams":
        """From fields where None means not given; the model's own defaults come next, then ours."""
        unknown = sorted(given.keys() - set(cls.__struct_fields__))
        if unknown:
            raise ParameterError(unknown[0], "is not a sampling parameter")
        fields = default_fields(generation_config or {})
        return cls(**fields | {name: value for name, value in given.items() if value is not None})

    def with_defaults(self, generation_config: dict[str, Any]) -> Self:
        """A copy where fields that equal this class's default take the model's own.

        A field set explicitly to the class's default cannot be told from one not set: callers that
        know which were given use `from_optional`.
        """
        blank = type(self)()
        fields = default_fields(generation_config)
        return self.replace(
            **{k: v for k, v in fields.items() if getattr(self, k) == getattr(blank, k)}
        )

    def replace(self, **changes: Any) -> Self:
        """A checked copy with other values."""
        return msgspec.structs.replace(self, **changes)

    def _normalize(self) -> None:
        """Other spellings of the same wish become one."""
        stop = [] if self.stop is None else [self.stop] if isinstance(self.stop, str) else self.stop
        force_setattr(self, "stop", list(stop))
        for name in ("stop_token_ids", "bad_words"):
            if getattr(self, name) is None:
                force_setattr(self, name, [])
        if self.seed == -1:
            force_setattr(self, "seed", None)
        if self.top_k == -1:
            force_setattr(self, "top_k", 0)
        if self.logprobs is True:  # the completions endpoint of old said true for 1
            force_setattr(self, "logprobs", 1)
        scored = self.prompt_logprobs is not None or self.prompt_logprob_token_ids
        if self.skip_reading_prefix_cache is None and scored:
            force_setattr(self, "skip_reading_prefix_cache", True)
        if not isinstance(self.output_kind, RequestOutputKind):
            force_setattr(self, "output_kind", RequestOutputKind(self.output_kind))
        if self.logit_bias is not None:
            force_setattr(self, "logit_bias", _clamped_bias(self.logit_bias))

    def _check_numbers(self) -> None:
        for name in ("presence_penalty", "frequency_penalty"):
            _within(name, getattr(self, name), -2.0, 2.0)
        _within("temperature", self.temperature, 0.0, 2.0)
        _within("min_p", self.min_p, 0.0, 1.0)
        if not (0.0 < _number("top_p", self.top_p) <= 1.0):
            raise ParameterError("top_p", f"must be above 0 and at most 1, got {self.top_p}")
        penalty = _number("repetition_penalty", self.repetition_penalty)
        if not (penalty > 0.0 and math.isfinite(penalty)):
            raise ParameterError("repetition_penalty", f"must be finite and above 0, got {penalty}")
        _at_least("top_k", self.top_k, 0, "must be at least 1, or 0 or -1 for all")
        if self.seed is not None and not -INT64 <= _integer("seed", self.seed) < INT64:
            raise ParameterError("seed", f"must fit in 64 bits, got {self.seed}")

    def _check_lengths(self) -> None:
        _at_least("n", self.n, 1)
        if self.n > MAX_SEQUENCES:
            raise ParameterError("n", f"must be at most {MAX_SEQUENCES}, got {self.n}")
        _at_least("min_tokens", self.min_tokens, 0)
        if self.max_tokens is not None:
            _at_least("max_tokens", self.max_tokens, 1)
            if self.min_tokens > self.max_tokens:
                raise ParameterError(
                    "min_tokens",
                    f"must be at most `max_tokens` ({self.max_tokens}), got {self.min_tokens}",
                )
        for name in ("logprobs", "prompt_logprobs"):
            if (k := getattr(self, name)) is not None:
                _at_least(name, k, -1, "must be at least 0, or -1 for the whole vocabulary")
        if self.prompt_logprob_start is not None:
            _at_least("prompt_logprob_start", self.prompt_logprob_start, 0)
        if self.stream_interval is not None:
            _at_least("stream_interval", self.stream_interval, 1)
        if self.thinking_token_budget is not None:
            _at_least(
                "thinking_token_budget",
                self.thinking_token_budget,
                -1,
                "must be at least 0, or -1 for unlimited",
            )
        if self.watermarking:
            raise ParameterError("watermarking", "must be left out: this engine sets no watermark")
        _check_int64("extra_args", self.extra_args)

    def _check_stops(self) -> None:
        for text in self.stop_strings:
            if not isinstance(text, str):
                raise ParameterError("stop", f"must be strings, got {text!r}")
            if not text:
                raise ParameterError("stop", "must not hold an empty string")
        if self.stop_strings and not self.detokenize:
            raise ParameterError(
                "stop",
                "needs `detokenize`: use `stop_token_ids` to stop without text",
            )
        if len(self.bad_words) > MAX_BAD_WORDS:
            raise ParameterError(
                "bad_words", f"takes at most {MAX_BAD_WORDS} words, got {len(self.bad_words)}"
            )
        for word in self.bad_words:
            if not isinstance(word, str) or not word.strip():
                raise ParameterError("bad_words", f"must be words, got {word!r}")

    def _check_tokens(self) -> None:
        for name in (
            "stop_token_ids",
            "allowed_token_ids",
            "logprob_token_ids",
            "prompt_logprob_token_ids",
        ):
            for token in getattr(self, name) or ():
                if isinstance(token, bool) or not isinstance(token, int) or token < 0:
                    raise ParameterError(name, f"must be token ids of at least 0, got {token!r}")
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise ParameterError("allowed_token_ids", "must not be empty: nothing could be chosen")
        for name in ("logprob_token_ids", "prompt_logprob_token_ids"):
            if (count := len(getattr(self, name) or ())) > MAX_LOGPROB_TOKEN_IDS:
                raise ParameterError(
                    name, f"takes at most {MAX_LOGPROB_TOKEN_IDS} ids, got {count}"
                )


def default_fields(generation_config: dict[str, Any]) -> dict[str, Any]:
    """The sampling fields that a generation_config.json sets, under our names."""
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    fields = {k: generation_config[k] for k in names if generation_config.get(k) is not None}
    if generation_config.get("max_new_tokens") is not None:
        fields["max_tokens"] = generation_config["max_new_tokens"]
    return fields


def _clamped_bias(bias: dict[Any, Any]) -> dict[int, float]:
    """Token ids as integers (JSON has them as strings), values within [-100, 100]."""
    if len(bias) > MAX_LOGIT_BIAS:
        raise ParameterError(
            "logit_bias", f"takes at most {MAX_LOGIT_BIAS} tokens, got {len(bias)}"
        )
    clamped = {}
    for token, value in bias.items():
        try:
            number, key = float(value), int(token)
        except (TypeError, ValueError):
            raise ParameterError(
                "logit_bias", f"must map token ids to numbers, got {token!r}: {value!r}"
            ) from None
        if key < 0 or math.isnan(number):
            raise ParameterError(
                "logit_bias", f"must map token ids to numbers, got {token!r}: {value!r}"
            )
        clamped[key] = min(100.0, max(-100.0, number))
    return clamped


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ParameterError(name, f"must be a number, got {value!r}")
    return value


def _integer(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ParameterError(name, f"must be an integer, got {value!r}")
    return value


def _within(name: str, value: Any, low: float, high: float) -> None:
    if not low <= _number(name, value) <= high:
        raise ParameterError(name, f"must be from {low:g} to {high:g}, got {value}")


def _at_least(name: str, value: Any, low: int, rule: str = "") -> None:
    if _integer(name, value) < low:
        raise ParameterError(name, f"{rule or f'must be at least {low}'}, got {value}")


def _check_int64(name: str, value: Any) -> None:
    """Integers that a message between processes cannot carry are refused here."""
    if isinstance(value, dict):
        for key, item in value.items():
            _check_int64(f"{name}.{key}", item)
    elif isinstance(value, list | tuple):
        for item in value:
            _check_int64(name, item)
    elif isinstance(value, int) and not -INT64 <= value < INT64:
        raise ParameterError(name, f"must hold integers of at most 64 bits, got {value}")
