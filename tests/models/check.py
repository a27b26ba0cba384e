"""What the family tests share: our model beside the one that wrote the checkpoint."""

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from safetensors.numpy import load_file

from octavo.models.config import ModelConfig
from octavo.models.load import load_params
from octavo.models.plain_ops import empty_cache, plain_ops
from octavo.models.registry import Model, build


def load(folder: Path, max_model_len: int = 128) -> tuple[Model, Any]:
    """The model and its float32 parameters from a folder of one safetensors file."""
    config = ModelConfig.from_hf(json.loads((folder / "config.json").read_text()))
    model = build(config, max_model_len)
    tensors = load_file(folder / "model.safetensors")
    return model, load_params(model, tensors.__getitem__, tensors, np.float32)


@functools.cache
def compiled(model: Model) -> Any:
    """(params, tokens, start, cache) -> (logits, cache); compiled once per model and shape."""

    def run(params: Any, tokens: jax.Array, start: jax.Array, cache: Any) -> Any:
        positions = start + jnp.arange(len(tokens))
        ops = plain_ops(positions)
        hidden, cache = model.forward(params, tokens, positions, cache, ops)
        return model.logits(params, hidden, ops), cache

    return jax.jit(run)


class Sequence:
    """One sequence with a dense cache: prompts and tokens in, logits out."""

    def __init__(self, model: Model, params: Any, length: int = 128):
        self.params, self.cache, self.done = params, empty_cache(model, length, jnp.float32), 0
        self.run = compiled(model)

    def __call__(self, tokens: Any) -> np.ndarray:
        """tokens [n] at the next n positions -> f32[n, V]."""
        ids = jnp.asarray(tokens, jnp.int32)
        logits, self.cache = self.run(self.params, ids, jnp.int32(self.done), self.cache)
        self.done += len(ids)
        return np.asarray(logits)


def prompt(length: int, vocab: int = 128, seed: int = 0) -> list[int]:
    return list(np.random.default_rng(seed).integers(3, vocab, length))


def torch_logits(model: Any, tokens: list[int]) -> np.ndarray:
    """One pass without a cache -> f32[n, V]."""
    with torch.no_grad():
        return model(torch.tensor([tokens]), use_cache=False).logits[0].float().numpy()


def torch_greedy(model: Any, tokens: list[int], count: int) -> tuple[list[int], float]:
    """The greedy continuation, and the smallest lead of a choice over the runner-up."""
    chosen, gap, cache, ids = [], np.inf, None, torch.tensor([tokens])
    with torch.no_grad():
        for _ in range(count):
            out = model(ids, past_key_values=cache, use_cache=True)
            cache, best = out.past_key_values, torch.topk(out.logits[0, -1], 2)
            gap = min(gap, float(best.values[0] - best.values[1]))
            chosen.append(int(best.indices[0]))
            ids = torch.tensor([[chosen[-1]]])
    return chosen, gap
