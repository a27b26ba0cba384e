"""Device-side state: all that one step reads and writes, as one pytree.

A step consumes a state and returns the next; every leaf is donated, so the old one is gone. Axis
letters as in docs/design.md: B slots, M pages per slot, P pages in a pool, S tokens per page, Q
tokens per decode row, V vocabulary, X the longest sequence.
"""

from dataclasses import dataclass
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

STOP_IDS = (
    8  # stop tokens checked on the device; a request with more has the rest checked by the host
)
TERMS = 5  # numbers of SlotState.terms before the stop tokens
BIAS = 256  # logit_bias entries per slot
LIVE, FINISHED, BY_STOP = 1, 2, 4  # bits of a row's flags in a step's result


@flax.struct.dataclass
class PageState:
    """Who holds which page, for one page group.

    Outside [first, held) a table row is 0, the trash page. The stack's cells at free_top and above
    are garbage; it is longer than the pool by one plan's worth of returns, so that a push is one
    contiguous write.
    """

    table: jax.Array  # i32[B, M] slot b owns table[b, first[b] : held[b]]
    first: jax.Array  # i32[B] pages before this one were given back (windows); else 0
    held: jax.Array  # i32[B]
    free_stack: jax.Array  # i32[P + U] pages nobody holds, the next to pop at free_top - 1
    free_top: jax.Array  # i32[]


@flax.struct.dataclass
class SlotState:
    """What the step knows of each sequence. Row B of the two-dimensional leaves takes padding."""

    active: jax.Array  # bool[B] the slot decodes: `last` waits to be run
    length: jax.Array  # i32[B] tokens whose keys and values are written
    last: jax.Array  # i32[B, Q] the sampled tokens that were not run yet
    terms: jax.Array  # i32[B, 5 + 8 + NS] what never changes: one leaf, for leaves cost dispatches
    adapter: jax.Array  # i32[B] 0 is the base model
    history: jax.Array  # i32[B + 1, X] the tokens by position; valid up to `length` (and `last`)
    counts: jax.Array  # f32[B, V] times generated, and a half where the token is in the prompt
    bias_ids: jax.Array  # i32[B + 1, BIAS]
    bias: jax.Array  # f32[B + 1, BIAS] added to the logits of bias_ids; 0 pads

    # The columns of `terms`: the first in the order of plan.SCALARS.
    @property
    def prompt_len(self) -> jax.Array:
        """i32[B] tokens that count as prompt."""
        return self.terms[:, 0]

    @property
    def limit(self) -> jax.Array:
        """i32[B] prompt and output together end here."""
        return self.terms[:, 1]

    @property
    def min_tokens(self) -> jax.Array:
        """i32[B] output tokens before a stop token may be sampled."""
        return self.terms[:, 2]

    @property
    def seed(self) -> jax.Array:
        """u32[B, 2] the request's seed, low half first."""
        return jax.lax.bitcast_convert_type(self.terms[:, 3:TERMS], jnp.uint32)

    @property
    def stop_ids(self) -> jax.Array:
        """i32[B, 8] tokens that end the sequence; -1 pads."""
        return self.terms[:, TERMS : TERMS + STOP_IDS]

    @property
    def sampling(self) -> jax.Array:
        """f32[B, NS] see pallas_kernels.sampling.Controls."""
        return jax.lax.bitcast_convert_type(self.terms[:, TERMS + STOP_IDS :], jnp.float32)


@flax.struct.dataclass
class EngineState:
    """One generation of the engine's state."""

    slots: SlotState
    pages: tuple[PageState, ...]  # one per page group
    kv: Any  # per layer, in the backend's layout


@dataclass(frozen=True)
class PageGroup:
    """Layers that share a page table; static."""

    window: int  # tokens a query sees; 0 sees all
    pages: int  # P, the trash page included


@dataclass(frozen=True)
class Dims:
    """The static sizes of a state and of its plans."""

    slots: int  # B
    page_size: int  # S, a power of two
    max_len: int  # X, the longest sequence
    vocab: int  # V
    groups: tuple[PageGroup, ...]
    controls: int  # NS, columns of SlotState.sampling
    max_chunk: int  # the largest prompt bucket
    counts: bool = True  # keep `counts`, which penalties need
    chunks: int = 32  # C, prompt chunks in one plan, and A, admissions

    @property
    def pages_per_slot(self) -> int:
        """M: pages of the longest sequence."""
        return -(-self.max_len // self.page_size)

    @property
    def returns(self) -> int:
        """U: pages one plan can push back, per group."""
        return max(64, 2 * self.pages_per_slot)

    @property
    def shift(self) -> int:
        """log2(S)."""
        return self.page_size.bit_length() - 1


def empty_pages(dims: Dims, group: PageGroup) -> PageState:
    """All pages but the trash page are free."""
    ids = jnp.arange(group.pages + dims.returns, dtype=jnp.int32) + 1
    return PageState(
        table=jnp.zeros((dims.slots, dims.pages_per_slot), jnp.int32),
        first=jnp.zeros((dims.slots,), jnp.int32),
        held=jnp.zeros((dims.slots,), jnp.int32),
        free_stack=jnp.where(ids < group.pages, ids, 0),
        free_top=jnp.full((), group.pages - 1, jnp.int32),
    )


def empty_slots(dims: Dims) -> SlotState:
    """No sequence anywhere."""
    slots = dims.slots

    def zeros(*shape: int, dtype: Any = jnp.int32) -> jax.Array:
        return jnp.zeros(shape, dtype)

    return SlotState(
        active=zeros(slots, dtype=jnp.bool_),
        length=zeros(slots),
        last=zeros(slots, 1),
        terms=zeros(slots, TERMS + STOP_IDS + dims.controls),
        adapter=zeros(slots),
        history=zeros(slots + 1, dims.max_len),
        counts=zeros(slots, dims.vocab if dims.counts else 1, dtype=jnp.float32),
        bias_ids=zeros(slots + 1, BIAS),
        bias=zeros(slots + 1, BIAS, dtype=jnp.float32),
    )
