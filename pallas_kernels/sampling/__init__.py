"""Sampling: from logits to tokens, by thresholds and never by a sort."""

from octavo.pallas_kernels.sampling.across import Across
from octavo.pallas_kernels.sampling.controls import NS, OFF, Controls
from octavo.pallas_kernels.sampling.penalties import Edits, count_generated, mark_prompt
from octavo.pallas_kernels.sampling.sample import argmax, named_logprobs, sample, top_logprobs

__all__ = [
    "NS",
    "OFF",
    "Across",
    "Controls",
    "Edits",
    "argmax",
    "count_generated",
    "mark_prompt",
    "named_logprobs",
    "sample",
    "top_logprobs",
]
