"""Masks that the host computes while the forward pass runs: which tokens a row may sample.

One bit per token, packed little-endian into u32[ceil(V / 32)]; bit v % 32 of word v // 32 allows
token v. Host code: no jax.
"""

import numpy as np

from octavo.engine.grammar.guide import Filler, mask_words
from octavo.engine.host import Flight, Host
from octavo.engine.sequence import Sequence


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
        self._filler = Filler(vocab)
        self._stuck: list[tuple[Sequence, str]] = []

    def build(self, host: Host, flight: Flight) -> np.ndarray:
        """u32[R, words] for the rows of a flight; every token before this step is known."""
        out = np.full((flight.rows, mask_words(self.vocab)), 0xFFFFFFFF, np.uint32)
        finals = {id(sequence) for sequence, _, _, final in flight.chunks if final}
        guided: list[tuple[int, Sequence]] = []
        for row, sequence in enumerate(flight.sequences):
            if sequence is None or not sequence.masked or sequence.slot < 0:
                continue
            if sequence.guide is None:
                out[row] = self._row(host, sequence)
            elif flight.decoding[row] or id(sequence) in finals:  # a prompt's first part waits
                guided.append((row, sequence))
        if guided:
            self._guide(host, out, guided)
        alive = {s.serial for s in flight.sequences if s is not None}
        for serial in [s for s in self._fixed if s not in alive]:
            del self._fixed[serial]
        return out

    def take_stuck(self) -> list[tuple[Sequence, str]]:
        """Sequences for which no token is left to choose, and why; their rows allow all."""
        stuck, self._stuck = self._stuck, []
        return stuck

    def _guide(self, host: Host, out: np.ndarray, guided: list[tuple[int, Sequence]]) -> None:
        """Put the masks of the grammars into their rows, together with what else is asked."""
        guides = []
        for _, sequence in guided:
            assert sequence.guide is not None, f"{sequence.handle=}"
            sequence.guide.advance(_output(host, sequence))
            guides.append(sequence.guide)
        filled = self._filler.fill(guides)
        for (row, sequence), mask, guide in zip(guided, filled, guides, strict=True):
            if guide.broken:
                self._stuck.append((sequence, guide.broken))
                continue
            out[row] = mask
            self._end_thoughts(host, sequence, out[row])
            if not _plain(sequence):
                out[row] &= self._row(host, sequence, ends=False)
                if not out[row].any():
                    self._stuck.append(
                        (
                            sequence,
                            "those that `allowed_token_ids` and `bad_words` leave do not fit",
                        )
                    )
                    out[row] = 0xFFFFFFFF
                    continue
            if sequence.request.sampling.min_tokens:
                later = out[row].copy()
                self._hold_ends(host, sequence, later)
                if later.any():  # else the grammar has ended: no text can be longer
                    out[row] = later

    def _row(self, host: Host, sequence: Sequence, ends: bool = True) -> np.ndarray:
        sampling = sequence.request.sampling
        fixed = self._fixed.get(sequence.serial)
        if fixed is None:
            allowed = sampling.allowed_token_ids
            ids = np.arange(self.vocab) if not allowed else np.array(allowed)
            fixed = self._fixed[sequence.serial] = pack_ids(ids, self.vocab)
            if sequence.guide is not None:  # what may end the text is the grammar's to say
                ends_too = list(sequence.guide.ends)
                fixed |= pack_ids(np.array(ends_too), self.vocab)
        mask = fixed.copy()
        output = _output(host, sequence)
        for word in sequence.request.bad_words:
            *before, last = word
            n = len(before)
            if n <= len(output) and (n == 0 or output[-n:].tolist() == before):
                mask[last >> 5] &= ~np.uint32(1 << (last & 31))
        if ends:
            self._end_thoughts(host, sequence, mask)
            self._hold_ends(host, sequence, mask)
        return mask

    def _end_thoughts(self, host: Host, sequence: Sequence, mask: np.ndarray) -> None:
        """Once thoughts have used up their budget, allow just the mark that ends them."""
        end = sequence.request.thought_end
        if not end or sequence.thought_over:
            return
        output = _output(host, sequence).tolist()
        sequence.thought_over = output[-len(end) :] == end
        if sequence.thought_over or len(output) < (
            sequence.request.sampling.thinking_token_budget or 0
        ):
            return
        begun = next(n for n in range(len(end) - 1, -1, -1) if output[len(output) - n :] == end[:n])
        mask[:] = pack_ids(np.array([end[begun]]), self.vocab)

    def _hold_ends(self, host: Host, sequence: Sequence, mask: np.ndarray) -> None:
        if len(_output(host, sequence)) < sequence.request.sampling.min_tokens:
            for token in sequence.stop_ids:
                mask[token >> 5] &= ~np.uint32(1 << (token & 31))


def _output(host: Host, sequence: Sequence) -> np.ndarray:
    """i32[n] what the sequence said so far."""
    return host.tokens[sequence.slot, sequence.prompt_len : int(host.known[sequence.slot])]


def _plain(sequence: Sequence) -> bool:
    """Whether nothing but a grammar rules it."""
    request = sequence.request
    return not (request.sampling.allowed_token_ids or request.bad_words)
