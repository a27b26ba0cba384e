"""Every family through the whole engine, from a checkpoint on disk, beside transformers."""

from pathlib import Path

import numpy as np
import pytest

from octavo.engine.config import EngineConfig
from octavo.engine.core import EngineCore
from tests.engine.tiny import Client
from tests.models.check import prompt, torch_greedy
from tests.models.tiny import FAMILIES, tiny_model

LENGTHS = (3, 23, 40)  # one chunk, one chunk beside another, two chunks
COUNT = 48


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_gives_the_tokens_of_transformers(family: str, tmp_path: Path) -> None:
    prompts = [prompt(length, seed=i) for i, length in enumerate(LENGTHS)]
    for seed in range(30):
        theirs = tiny_model(family, seed)
        both = [torch_greedy(theirs, text, COUNT) for text in prompts]
        if min(gap for _, gap in both) > 1e-3:
            break
    else:
        raise AssertionError(f"no seed of {family} chooses clearly")
    theirs.save_pretrained(tmp_path)
    config = EngineConfig(
        model=str(tmp_path),
        device="cpu",
        max_model_len=96,
        max_num_seqs=2,
        max_num_batched_tokens=32,
        page_size=8,
        compilation_cache="none",
    )
    core = EngineCore(config)
    try:
        assert core.eos_token_ids == [2]
        client = Client(core)
        handles = [client.add(text, max_tokens=COUNT, ignore_eos=True) for text in prompts]
        client.drain()
        for handle, (want, _) in zip(handles, both, strict=True):
            np.testing.assert_array_equal(client.tokens[handle], want)
    finally:
        core.close()
