"""A request that reaches the engine can be served; one that cannot is told why."""

import numpy as np
import pytest

from octavo.engine.sampling_params import ParameterError, SamplingParams
from octavo.engine.text.generation import (
    RequestLimits,
    default_sampling_params,
    make_request,
    tokenized_words,
)

LIMITS = RequestLimits(max_model_len=10, vocab_size=100, eos_token_ids=(2,), max_logprobs=5)


def request(prompt=(1, 2, 3), limits=LIMITS, tokenizer=None, **params):
    return make_request(
        handle=1,
        request_id="r",
        prompt_token_ids=list(prompt),
        params=SamplingParams(**params),
        limits=limits,
        tokenizer=tokenizer,
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"prompt": range(12)},
            "`prompt` has 12 tokens, the context is 10: shorten it by 3, "
            "or start with a larger --max-model-len",
        ),
        ({"prompt": ()}, "`prompt` must hold at least one token, got none"),
        ({"prompt": (1, 100)}, "`prompt` has token id 100, the vocabulary is 0 to 99"),
        ({"prompt": (-1,)}, "`prompt` has token id -1, the vocabulary is 0 to 99"),
        (
            {"allowed_token_ids": [100]},
            "`allowed_token_ids` has token id 100, the vocabulary is 0 to 99",
        ),
        ({"logit_bias": {200: 1}}, "`logit_bias` has token id 200, the vocabulary is 0 to 99"),
        (
            {"logprobs": 6},
            "`logprobs` must be at most 5, got 6: ask for fewer, "
            "or start with a larger --max-logprobs",
        ),
        (
            {"prompt_logprobs": -1},
            "`prompt_logprobs` must be at most 5, got -1: ask for fewer, "
            "or start with a larger --max-logprobs",
        ),
        ({"bad_words": ["x"]}, "`bad_words` needs a tokenizer, and this model has none"),
    ],
)
def test_what_the_model_cannot_do_is_named(options, message):
    with pytest.raises(ParameterError) as error:
        request(**options)
    assert str(error.value) == message


def test_the_longest_prompt_leaves_room_for_one_token():
    made = request(prompt=range(9), max_tokens=None)
    assert made.sampling.max_tokens == 1
    assert np.frombuffer(made.prompt, "<i4").tolist() == list(range(9))


def test_max_tokens_are_cut_to_the_context():
    made = request(max_tokens=50, min_tokens=40)
    assert (made.sampling.max_tokens, made.sampling.min_tokens) == (7, 7)
    params = SamplingParams(max_tokens=5)
    kept = make_request(
        handle=1, request_id="r", prompt_token_ids=[1], params=params, limits=LIMITS
    )
    assert kept.sampling is params


def test_the_tokenizers_own_end_token_stops_too(smollm2):
    limits = RequestLimits(max_model_len=10, vocab_size=100, eos_token_ids=(0,))
    assert request(limits=limits, tokenizer=smollm2).sampling.stop_token_ids == [2]
    assert request(tokenizer=smollm2).sampling.stop_token_ids == []
    assert request(limits=limits, tokenizer=smollm2, ignore_eos=True).sampling.stop_token_ids == []


def test_bad_words_are_bad_after_a_space_too(smollm2):
    words = tokenized_words([" dog"], smollm2)
    assert [smollm2.decode(ids) for ids in words] == ["dog", " dog"]
    assert request(tokenizer=smollm2, bad_words=["dog"]).bad_words == words


def test_the_models_defaults_are_ours_where_it_has_some():
    params = default_sampling_params({"temperature": 0.6, "top_k": 20, "eos_token_id": 2})
    assert (params.temperature, params.top_k, params.top_p) == (0.6, 20, 1.0)
