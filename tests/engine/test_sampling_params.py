"""SamplingParams says what is wrong, in whose words, and survives the trip between processes."""

import subprocess
import sys

import msgspec
import pytest

from octavo.engine.messages import AddRequest
from octavo.engine.sampling_params import (
    ParameterError,
    RepetitionDetectionParams,
    RequestOutputKind,
    SamplingParams,
    StructuredOutputsParams,
)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_tokens": 0}, "`max_tokens` must be at least 1, got 0"),
        ({"max_tokens": -3}, "`max_tokens` must be at least 1, got -3"),
        ({"n": 0}, "`n` must be at least 1, got 0"),
        ({"n": 16385}, "`n` must be at most 16384, got 16385"),
        (
            {"n": 2, "temperature": 0},
            "`n` must be 1 when `temperature` is 0, got 2: all would be the same",
        ),
        ({"temperature": 2.5}, "`temperature` must be from 0 to 2, got 2.5"),
        ({"temperature": float("nan")}, "`temperature` must be from 0 to 2, got nan"),
        ({"temperature": "hot"}, "`temperature` must be a number, got 'hot'"),
        ({"presence_penalty": -3}, "`presence_penalty` must be from -2 to 2, got -3"),
        ({"repetition_penalty": 0}, "`repetition_penalty` must be finite and above 0, got 0"),
        ({"top_p": 0}, "`top_p` must be above 0 and at most 1, got 0"),
        ({"top_k": -2}, "`top_k` must be at least 1, or 0 or -1 for all, got -2"),
        ({"top_k": 1.5}, "`top_k` must be an integer, got 1.5"),
        ({"min_p": 1.5}, "`min_p` must be from 0 to 1, got 1.5"),
        ({"min_tokens": 17}, "`min_tokens` must be at most `max_tokens` (16), got 17"),
        (
            {"logprobs": -2},
            "`logprobs` must be at least 0, or -1 for the whole vocabulary, got -2",
        ),
        ({"stop": ["a", ""]}, "`stop` must not hold an empty string"),
        ({"stop_token_ids": [-1]}, "`stop_token_ids` must be token ids of at least 0, got -1"),
        (
            {"allowed_token_ids": []},
            "`allowed_token_ids` must not be empty: nothing could be chosen",
        ),
        ({"bad_words": ["x"] * 129}, "`bad_words` takes at most 128 words, got 129"),
        (
            {"logit_bias": dict.fromkeys(range(257), 1)},
            "`logit_bias` takes at most 256 tokens, got 257",
        ),
        (
            {"thinking_token_budget": -2},
            "`thinking_token_budget` must be at least 0, or -1 for unlimited, got -2",
        ),
        ({"stream_interval": 0}, "`stream_interval` must be at least 1, got 0"),
        ({"seed": 2**64}, f"`seed` must fit in 64 bits, got {2**64}"),
        (
            {"extra_args": {"a": [2**63]}},
            f"`extra_args.a` must hold integers of at most 64 bits, got {2**63}",
        ),
    ],
)
def test_an_error_names_the_field_and_the_value(fields, message):
    with pytest.raises(ParameterError) as error:
        SamplingParams(**fields)
    assert str(error.value) == message
    assert message.startswith(f"`{error.value.parameter}`")


def test_stop_strings_need_text():
    with pytest.raises(ValueError, match="`stop` needs `detokenize`"):
        SamplingParams(stop="x", detokenize=False)


def test_greedy_switches_the_filters_off():
    params = SamplingParams(temperature=0, top_p=0.5, top_k=10, min_p=0.1)
    assert params.greedy
    assert (params.top_p, params.top_k, params.min_p) == (1.0, 0, 0.0)


def test_a_tiny_temperature_is_raised_and_a_tinier_one_is_greedy():
    assert SamplingParams(temperature=0.005).temperature == 0.01
    assert SamplingParams(temperature=1e-6).greedy


def test_other_spellings_become_one():
    params = SamplingParams(stop="end", seed=-1, top_k=-1, logit_bias={"7": 500, 8: -500})  # type: ignore[dict-item]
    assert params.stop_strings == ["end"]
    assert params.seed is None
    assert params.top_k == 0
    assert params.logit_bias == {7: 100.0, 8: -100.0}
    assert SamplingParams(prompt_logprobs=1).skip_reading_prefix_cache is True


def test_structured_outputs_take_exactly_one_kind():
    assert StructuredOutputsParams(regex="a+").regex == "a+"
    with pytest.raises(ParameterError, match="got none"):
        StructuredOutputsParams()
    with pytest.raises(ParameterError, match="got json and regex"):
        StructuredOutputsParams(json={}, regex="a")


def test_repetition_detection_checks_its_sizes():
    with pytest.raises(ParameterError, match="`min_count` must be at least 2"):
        RepetitionDetectionParams(max_pattern_size=4, min_count=1)
    with pytest.raises(ParameterError, match="from 1 to `max_pattern_size`"):
        RepetitionDetectionParams(max_pattern_size=4, min_pattern_size=5)


def test_the_models_defaults_yield_to_what_was_given():
    config = {"temperature": 0.2, "top_p": 0.9, "max_new_tokens": 64, "eos_token_id": 2}
    params = SamplingParams.from_optional(config, temperature=1.0, top_p=None)
    assert (params.temperature, params.top_p, params.max_tokens) == (1.0, 0.9, 64)
    params = SamplingParams(top_p=0.5).with_defaults(config)
    assert (params.temperature, params.top_p, params.max_tokens) == (0.2, 0.5, 64)
    with pytest.raises(ParameterError, match="`warmth` is not a sampling parameter"):
        SamplingParams.from_optional(warmth=1)


def test_it_survives_the_trip_between_processes():
    params = SamplingParams(
        stop=["a"],
        logit_bias={3: 1.5},
        output_kind=RequestOutputKind.DELTA,
        structured_outputs=StructuredOutputsParams(json={"type": "object"}),
        repetition_detection=RepetitionDetectionParams(max_pattern_size=3),
    )
    request = AddRequest(handle=1, request_id="r", prompt=b"", sampling=params)
    back = msgspec.msgpack.decode(msgspec.msgpack.encode(request), type=AddRequest)
    assert back == request
    assert len(msgspec.msgpack.encode(SamplingParams())) <= 3  # defaults are not sent


def test_nothing_here_imports_jax():
    program = (
        "import sys, octavo.engine.messages, octavo.engine.config; print('jax' in sys.modules)"
    )
    assert subprocess.check_output([sys.executable, "-c", program], text=True) == "False\n"
