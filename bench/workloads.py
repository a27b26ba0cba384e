"""The workloads that every engine is measured on: token ids in, a fixed number of tokens out.

Seeded, so that another engine can be given the very same work.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Workload:
    """Requests that all arrive at once."""

    name: str
    prompts: list[list[int]]
    outputs: list[int]  # tokens to generate for each

    @property
    def tokens_in(self) -> int:
        return sum(map(len, self.prompts))

    @property
    def tokens_out(self) -> int:
        return sum(self.outputs)


NAMES = ("single_stream", "prefill_heavy", "decode_heavy", "chat_mix")


def make(name: str, vocab: int) -> Workload:
    """The workload `name` with token ids of a vocabulary of `vocab`. KeyError for another name."""
    seed = {"prefill_heavy": 1, "decode_heavy": 2, "chat_mix": 3, "single_stream": 4}[name]
    random = np.random.default_rng(seed)
    if name == "chat_mix":
        prompt = np.clip(random.lognormal(5.2, 0.9, 512), 16, 2048).astype(int)
        output = np.clip(random.lognormal(5.0, 0.8, 512), 16, 1024).astype(int)
    else:
        count, inside, outside = {
            "prefill_heavy": (256, 1024, 128),
            "decode_heavy": (256, 128, 512),
            "single_stream": (1, 128, 256),
        }[name]
        prompt, output = np.full(count, inside), np.full(count, outside)
    prompts = [random.integers(10, vocab - 10, int(n)).tolist() for n in prompt]
    return Workload(name, prompts, [int(n) for n in output])
