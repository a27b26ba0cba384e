"""Masks that the host computes while the forward pass runs: which tokens a row may sample.

One bit per token, packed little-endian into u32[ceil(V / 32)]; bit v % 32 of word v // 32 allows
token v. Host code: no jax.
"""

import numpy as np

from octavo.engine.host import Flight, Host
from octavo.engine.sequence import Sequence


def mask_words(vocab: int) -> int:
    """Words of one row's mask."""
    return -(-vocab // 32)


def pack_ids(ids: np.ndarray, vocab: int) -> np.ndarray:
    """The mask that allows just these tokens."""
    bits = np.zeros(mask_words(vocab) * 32, np.uint8)
    bits[ids] = 1
    return np.packbits(bits, bitorder="little").view(np.uint32)


class Masks:
    """Builds a step's masks; a request's fixed part is built once."""

    def __init__(self, vocab: int) -> None:
        self.vocab = vocab
        self._fixed: dict[int, np.ndarray] = {}  # by serial

    def build(self, host: Host, flight: Flight) -> np.ndarray:
        """u32[R, words] for the rows of a flight; every token before this step is known."""
        out = np.full((flight.rows, mask_words(self.vocab)), 0xFFFFFFFF, np.uint32)
        for row, sequence in enumerate(flight.sequences):
            if sequence is not None and sequence.masked and sequence.slot >= 0:
                out[row] = self._row(host, sequence)
        alive = {s.serial for s in flight.sequences if s is not None}
        for serial in [s for s in self._fixed if s not in alive]:
            del self._fixed[serial]
        return out

    def _row(self, host: Host, sequence: Sequence) -> np.ndarray:
        sampling = sequence.request.sampling
        fixed = self._fixed.get(sequence.serial)
        if fixed is None:
            allowed = sampling.allowed_token_ids
            ids = np.arange(self.vocab) if not allowed else np.array(allowed)
            fixed = self._fixed[sequence.serial] = pack_ids(ids, self.vocab)
        mask = fixed.copy()
        known = int(host.known[sequence.slot])
        output = host.tokens[sequence.slot, sequence.prompt_len : known]
        for word in sequence.request.bad_words:
            *before, last = word
            n = len(before)
            if n <= len(output) and (n == 0 or output[-n:].tolist() == before):
                mask[last >> 5] &= ~np.uint32(1 << (last & 31))
        if len(output) < sampling.min_tokens:
            for token in sequence.stop_ids:
                mask[token >> 5] &= ~np.uint32(1 << (token & 31))
        return mask
