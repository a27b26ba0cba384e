"""BERT, RoBERTa and classifiers beside transformers: tiny random checkpoints in float32."""

import functools
import tempfile
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from octavo.models.plain_ops import empty_cache, plain_ops
from octavo.models.registry import Model
from tests.models.check import load, prompt
from tests.models.tiny import COMMON, tiny_model

TOLERANCE = 2e-5  # values of size 1 to 4, float32 sums in another order
ENCODER: dict[str, Any] = {k: v for k, v in COMMON.items() if k != "num_key_value_heads"}
SECOND = 9  # where the second text of a pair begins


@functools.cache
def both(name: str, **own: Any) -> tuple[Any, Model, Any]:
    """The transformers model of this class, ours, and its parameters."""
    family = name.split("Model")[0].split("For")[0]
    config = getattr(transformers, f"{family}Config")(**ENCODER | own)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    theirs = getattr(transformers, name)(config).to(torch.float32).eval()
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            if "LayerNorm" in key or key.endswith(".bias"):
                parameter.add_(torch.randn_like(parameter) * 0.2)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        return theirs, *load(Path(folder))


def read(model: Model, params: Any, ids: list[int], types: list[int] | None) -> Any:
    """Hidden states f32[n, E] with the plain operations."""
    positions = jnp.arange(len(ids))
    more = {} if types is None else {"types": jnp.asarray(types)}
    cache = empty_cache(model, len(ids), jnp.float32)
    return model.forward(params, jnp.asarray(ids), positions, cache, plain_ops(positions), **more)[
        0
    ]


@pytest.mark.parametrize("name", ["BertModel", "RobertaModel", "XLMRobertaModel"])
def test_hidden_states_are_those_of_transformers(name: str) -> None:
    types = 1 if "Roberta" in name else 2
    theirs, model, params = both(name, type_vocab_size=types, pad_token_id=2)
    ids = prompt(23)
    with torch.no_grad():
        want = theirs(torch.tensor([ids])).last_hidden_state[0].numpy()
    got = read(model, params, ids, None)
    np.testing.assert_allclose(got, want, atol=TOLERANCE, rtol=0)


def test_the_second_text_of_a_pair_has_its_own_type() -> None:
    theirs, model, params = both("BertModel", type_vocab_size=2, pad_token_id=2)
    ids, types = prompt(23), [0] * SECOND + [1] * (23 - SECOND)
    with torch.no_grad():
        want = theirs(torch.tensor([ids]), token_type_ids=torch.tensor([types]))
    got = read(model, params, ids, types)
    np.testing.assert_allclose(got, want.last_hidden_state[0].numpy(), atol=TOLERANCE, rtol=0)
    assert np.abs(got - read(model, params, ids, None)).max() > 0.1


@pytest.mark.parametrize("labels", [1, 3])
@pytest.mark.parametrize("family", ["Bert", "XLMRoberta"])
def test_a_classifier_gives_the_numbers_of_transformers(family: str, labels: int) -> None:
    types = 1 if family == "XLMRoberta" else 2
    name = f"{family}ForSequenceClassification"
    theirs, model, params = both(name, num_labels=labels, type_vocab_size=types)
    ids = prompt(17)
    with torch.no_grad():
        want = theirs(torch.tensor([ids])).logits[0].numpy()
    hidden = read(model, params, ids, None)
    got = model.logits(params, hidden[:1], plain_ops(jnp.arange(1)))[0]
    assert got.shape == (labels,)
    np.testing.assert_allclose(got, want, atol=TOLERANCE, rtol=0)


def test_a_checkpoint_made_for_filling_gaps_gives_its_encoder() -> None:
    theirs, model, params = both("BertForMaskedLM", type_vocab_size=2)
    ids = prompt(11)
    with torch.no_grad():
        want = theirs.bert(torch.tensor([ids])).last_hidden_state[0].numpy()
    np.testing.assert_allclose(read(model, params, ids, None), want, atol=TOLERANCE, rtol=0)


def test_a_decoder_with_a_classifier_gives_the_numbers_of_transformers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = tiny_model("qwen3").config
    config.num_labels = 1
    theirs: Any = transformers.Qwen3ForSequenceClassification(config).eval()
    theirs.save_pretrained(tmp_path)
    model, params = load(tmp_path)
    ids = prompt(17)
    with torch.no_grad():
        want = theirs(torch.tensor([ids])).logits[0].numpy()
    hidden = read(model, params, ids, None)
    got = model.logits(params, hidden[-1:], plain_ops(jnp.arange(1)))[0]
    np.testing.assert_allclose(got, want, atol=TOLERANCE, rtol=0)


def test_a_decoder_saved_without_its_head_has_the_same_hidden_states(tmp_path: Path) -> None:
    theirs = tiny_model("qwen3").model
    theirs.save_pretrained(tmp_path)
    model, params = load(tmp_path)
    assert not model.config.generates
    ids = prompt(17)
    with torch.no_grad():
        want = theirs(torch.tensor([ids])).last_hidden_state[0].numpy()
    np.testing.assert_allclose(read(model, params, ids, None), want, atol=1e-4, rtol=0)
