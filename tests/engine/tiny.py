"""Tiny engines with random weights, a client that drives them, and the text they must give."""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from octavo.backends.record import Backend
from octavo.backends.select import select
from octavo.engine.assemble import Parts
from octavo.engine.config import EngineConfig, devices_of
from octavo.engine.core import EngineCore
from octavo.engine.host import Host, Limits
from octavo.engine.memory import resolve
from octavo.engine.mesh import Placement
from octavo.engine.messages import AddRequest, Finish, Logprobs, Output, Start
from octavo.engine.recovery import Recovery
from octavo.engine.sampling_params import SamplingParams
from octavo.models.config import ModelConfig
from octavo.models.load import random_params
from octavo.models.plain_ops import empty_cache, plain_ops
from octavo.models.registry import Model
from octavo.pallas_kernels.sampling import Controls, sample

VOCAB = 128
EOS = [5, 17, 33, 90]  # several, so that some of the random texts end early
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
}
LLAMA = SIZES | {"architectures": ["LlamaForCausalLM"]}
MISTRAL = SIZES | {"architectures": ["MistralForCausalLM"], "sliding_window": 12}
GEMMA3 = SIZES | {
    "architectures": ["Gemma3ForCausalLM"],
    "num_hidden_layers": 3,
    "sliding_window": 12,
    "sliding_window_pattern": 3,
    "query_pre_attn_scalar": 8,
}


def make_parts(
    facts: dict[str, Any],
    *,
    eos: Iterable[int] = (),
    backend: Callable[[Backend], Backend] = lambda b: b,
    **settings: Any,
) -> Parts:
    """Random weights, and the sizes that `settings` (of EngineConfig) resolve to."""
    config = EngineConfig(device="cpu", compilation_cache="none", **settings)
    config.validate()
    chosen = backend(select("cpu", devices_of(config.mesh)))
    resolved = resolve(config, chosen, ModelConfig.from_hf(facts))
    place = Placement(resolved.mesh, resolved.model)
    params = random_params(resolved.model, 1, resolved.dtype, put=place.put_weight)
    return Parts(chosen, resolved, params, list(eos), 0.0)


def make_engine(parts: Parts) -> EngineCore:
    """An engine with its own copy of the weights, which it deletes when it is closed."""
    params = jax.tree.map(jnp.copy, parts.params)
    return EngineCore(parts.resolved.config, parts=replace(parts, params=params))


def begin_anew(
    core: EngineCore,
    *,
    depth: int = 2,
    prefix_caching: bool = True,
    by_priority: bool = False,
    budget: int = 0,
    steps: int = 1,
) -> EngineCore:
    """The same compiled programs under an empty host with other rules: no compile.

    `budget` keeps only the prompt buckets up to that many tokens; 0 keeps all. `steps` is 1 or what
    the engine was made for.
    """
    dims, buckets = core.resolved.dims, core.resolved.token_buckets
    core.limits = Limits(
        dims=dims,
        row_buckets=core.resolved.row_buckets,
        token_buckets=tuple(b for b in buckets if not budget or b <= budget),
        depth=depth,
        prefix_caching=prefix_caching,
        by_priority=by_priority,
        steps=steps,
        several_rows=core.resolved.several_rows if steps > 1 else (),
    )
    core.lanes = [Host(core.limits) for _ in core.lanes]
    core.intake.serials = 0
    core.device.limits = core.limits
    core.recovery = Recovery()
    core.device.rebuild()
    return core


@dataclass
class Client:
    """Sends requests to a core and collects what comes back; a token after the end is an error."""

    core: EngineCore
    tokens: dict[int, list[int]] = field(default_factory=dict)
    finished: dict[int, Finish] = field(default_factory=dict)
    starts: list[Start] = field(default_factory=list)
    logprobs: dict[int, list[Logprobs]] = field(default_factory=dict)
    aborted: set[int] = field(default_factory=set)
    next_handle: int = 0

    def add(
        self,
        prompt: Iterable[int],
        *,
        priority: int = 0,
        salt: str = "",
        bad_words: list[list[int]] | None = None,
        arrival: float = 0.0,
        timeout: float = 0.0,
        grammar: str = "",
        mask_after: list[int] | None = None,
        thought_end: list[int] | None = None,
        **sampling: Any,
    ) -> int:
        """Queue a request, greedy unless told otherwise; returns its first handle."""
        params = SamplingParams(**{"temperature": 0.0, "max_tokens": 8} | sampling)
        handle = self.next_handle
        self.next_handle += params.n
        for h in range(handle, self.next_handle):
            self.tokens[h] = []
        self.core.add(
            AddRequest(
                handle=handle,
                request_id=f"r{handle}",
                prompt=np.asarray(list(prompt), np.int32).tobytes(),
                sampling=params,
                bad_words=bad_words or [],
                priority=priority,
                cache_salt=salt,
                arrival=arrival,
                timeout=timeout,
                grammar=grammar,
                mask_after=mask_after or [],
                thought_end=thought_end or [],
            )
        )
        return handle

    def abort(self, handles: Iterable[int]) -> None:
        """Forget some."""
        handles = list(handles)
        self.aborted.update(h for h in handles if h not in self.finished)
        self.core.abort(handles)

    def turn(self) -> None:
        """One turn of the loop."""
        for output in self.core.turn():
            self.collect(output)

    def collect(self, output: Output) -> None:
        """Sort one message's contents by handle."""
        self.starts += output.starts
        handles = np.frombuffer(output.handles, np.uint32).tolist()
        for handle, token in zip(handles, np.frombuffer(output.tokens, np.int32), strict=True):
            assert handle not in self.finished, f"{handle=} got a token after its end"
            assert handle not in self.aborted, f"{handle=} got a token after its abort"
            self.tokens[handle].append(int(token))
        for finish in output.finished:
            assert finish.handle not in self.finished, f"{finish.handle} ended twice"
            self.finished[finish.handle] = finish
        for row in output.logprobs:
            self.logprobs.setdefault(row.handle, []).append(row)

    def drain(self, most: int = 5000) -> "Client":
        """Turn until nothing is left to do."""
        for _ in range(most):
            if not self.core.has_work():
                return self
            self.turn()
        raise AssertionError(f"still busy after {most} turns: {self.core.stats()}")


def run_one(core: EngineCore, prompt: Iterable[int], **request: Any) -> list[int]:
    """The tokens of one request on an otherwise idle engine."""
    client = Client(core)
    handle = client.add(prompt, **request)
    client.drain()
    assert client.finished[handle].reason != "error", client.finished[handle].message
    return client.tokens[handle]


class Reference:
    """What one sequence alone gives with the plain operations and a dense cache."""

    def __init__(self, parts: Parts) -> None:
        self.model: Model = parts.resolved.model
        self.params = parts.params
        self.longest, self.kv_dtype = parts.resolved.max_model_len, parts.resolved.kv_dtype
        self.eos = parts.eos_token_ids
        self._generate = jax.jit(self._scan)
        self._forward = jax.jit(self._whole)
        self._texts: dict[Any, list[int]] = {}

    def _scan(self, params: Any, prompt: jax.Array, n: jax.Array, row: Any, seed: Any) -> Any:
        """prompt i32[X] of n tokens -> every next token i32[X - 1]."""
        controls = Controls.unpack(row[None])

        def one(carry: Any, position: jax.Array) -> Any:
            token, cache = carry
            at = position[None]
            ops = plain_ops(at)
            hidden, cache = self.model.forward(params, token[None], at, cache, ops)
            logits = self.model.logits(params, hidden, ops)
            chosen, _ = sample(logits, controls, seed[None], at + 1)
            following = jnp.where(position + 1 < n, prompt[position + 1], chosen[0])
            return (following, cache), following

        cache = empty_cache(self.model, self.longest, self.kv_dtype)
        positions = jnp.arange(self.longest - 1, dtype=jnp.int32)
        return jax.lax.scan(one, (prompt[0], cache), positions)[1]

    def _whole(self, params: Any, tokens: jax.Array) -> jax.Array:
        positions = jnp.arange(self.longest, dtype=jnp.int32)
        cache = empty_cache(self.model, self.longest, self.kv_dtype)
        ops = plain_ops(positions)
        hidden, _ = self.model.forward(params, tokens, positions, cache, ops)
        return self.model.logits(params, hidden, ops)

    def logits(self, tokens: Iterable[int]) -> np.ndarray:
        """f32[n, V]: row i is the distribution after tokens[: i + 1]."""
        ids = np.asarray(list(tokens), np.int32)
        padded = np.zeros(self.longest, np.int32)
        padded[: len(ids)] = ids
        return np.asarray(self._forward(self.params, padded))[: len(ids)]

    def text(
        self,
        prompt: Iterable[int],
        count: int,
        *,
        temperature: float = 0.0,
        seed: int = 0,
        choice: int = 0,
        ignore_eos: bool = False,
        stops: Iterable[int] = (),
    ) -> list[int]:
        """The continuation: `count` tokens, or up to an end token or the end of the context."""
        prompt = list(prompt)
        key = (tuple(prompt), temperature, seed, choice)
        if key not in self._texts:
            padded = np.zeros(self.longest, np.int32)
            padded[: len(prompt)] = prompt
            row = Controls.pack(temperature=temperature, choice=choice)
            seeds = np.array([seed & 0xFFFFFFFF, seed >> 32], np.uint32)
            n = np.int32(len(prompt))
            out = self._generate(self.params, padded, n, row, seeds)
            self._texts[key] = np.asarray(out)[len(prompt) - 1 :].tolist()
        out = self._texts[key][:count]
        last = {*stops, *([] if ignore_eos else self.eos)}
        ends = [i for i, token in enumerate(out) if token in last]
        return out[: ends[0] + 1] if ends else out


@functools.cache
def trunk(which: int, vocab: int = VOCAB) -> list[int]:
    """The same 200 random tokens every time, so that prompts can begin alike."""
    return [int(t) for t in np.random.default_rng(100 + which).integers(6, vocab, 200)]


def prompt(length: int, which: int = 0, tail: int = 0, tail_seed: int = 0) -> list[int]:
    """`length` tokens of a trunk, then `tail` others."""
    own = np.random.default_rng(7000 + tail_seed).integers(6, VOCAB, tail)
    return trunk(which)[:length] + [int(t) for t in own]
