"""Tokenizers that the tests share: real ones, and tiny ones of each kind of decoder."""

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from octavo.engine.text.tokenizer import Tokenizer, load_tokenizer
from octavo.models.checkpoint import CheckpointError


def load_or_skip(name):
    try:
        return load_tokenizer(name)
    except CheckpointError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def smollm2():
    """Byte-level BPE with a chat template."""
    return load_or_skip("smollm2-135m")


@pytest.fixture(scope="session")
def gemma3():
    """SentencePiece BPE with byte fallback, a BOS, no chat template."""
    return load_or_skip("gemma3-270m")


@pytest.fixture(scope="session")
def metaspace():
    """A decoder that looks at neighbours, so that the table of pieces does not apply."""
    backend = Backend(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=60, special_tokens=["<eos>"], unk_token="<eos>")
    backend.train_from_iterator(["the quick brown fox jumps over the lazy dog"] * 3, trainer)
    tokenizer = Tokenizer(backend, special_tokens={"eos_token": "<eos>"})
    assert tokenizer.pieces is None
    return tokenizer
