"""What the engine knows of a kind of hardware: one frozen record, and no class tree.

Nothing outside this folder asks which hardware it runs on.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax

from octavo.models.ops import head

# `kv_cache_dtype` by the names that people know, where numpy's is another.
CACHE_DTYPES = {"fp8": "float8_e4m3fn", "int8": "int8"}


def cache_dtype(config: Any, default: str) -> str:
    """The dtype of cached keys and values; `default` where the config names none."""
    if config.kv_cache_dtype != "auto":
        return CACHE_DTYPES.get(config.kv_cache_dtype, str(config.kv_cache_dtype))
    return default if config.dtype == "auto" else str(config.dtype)


class BackendError(ValueError):
    """A device that cannot be used: which, why, and what to write instead."""


class Layer(Protocol):
    """What a cache must know of one layer (`models.ops.LayerSpec` is one)."""

    @property
    def group(self) -> int: ...

    @property
    def window(self) -> int: ...


class InitCache(Protocol):
    """Makes the cache: one entry per layer, each with the pages of the layer's group."""

    def __call__(
        self,
        layers: Sequence[Layer],
        pages: Sequence[int],  # per group, the trash page included
        page_size: int,
        kv_heads: int,
        head_size: int,
        dtype: jax.typing.DTypeLike,
    ) -> tuple[Any, ...]: ...


@dataclass(frozen=True, kw_only=True)
class Backend:
    """One kind of hardware, and how Octavo runs on it."""

    name: str
    reason: str  # one line: what was chosen and why
    devices: tuple[jax.Device, ...]  # what it computes on, the first one first

    # attend(q [N, H, D], k [N, K, D], v [N, K, D], cache, batch: RaggedBatch, *, window, scale,
    # softcap, sinks=None, kv_scales=None) -> ([N, H, D], cache): writes, then attends; `cache` is
    # one entry of init_cache. pallas_kernels/attention/reference.py is the definition.
    attend: Callable[..., tuple[jax.Array, Any]]
    init_cache: InitCache
    # page_bytes(layers, page_size, kv_heads, head_size, dtype): one page in all of `layers` layers
    page_bytes: Callable[[int, int, int, int, jax.typing.DTypeLike], int]

    # These three are `models.ops.Ops` of the same names.
    linear: Callable[[jax.Array, Any], jax.Array]
    grouped_linear: Callable[..., jax.Array]
    layers: Callable[..., tuple[jax.Array, Any]]
    head: Callable[[jax.Array, jax.Array], jax.Array] = head  # likewise
    # attend_packed(mixed [N, K, J, D], turn, norms, cache, batch, *, window, scale, softcap, eps,
    # offset) -> (out, cache), or None where it refuses the step: norms and rotation are its own.
    attend_packed: Callable[..., tuple[jax.Array, Any] | None] = lambda *_, **__: None
    # gated_linear(x [N, E], Linear [E, 2, F], act) -> [N, F], or None, likewise
    gated_linear: Callable[..., jax.Array | None] = lambda *_: None
    stacked: bool = False  # `layers` wants `models.ops.Stacks`, and one cache for all of a group

    columns: int = 0  # stacked matrices are kept in blocks of so many columns; 0: whole

    row_buckets: Callable[[int], tuple[int, ...]]  # of max_num_seqs, ascending, the last is it
    token_buckets: Callable[[int], tuple[int, ...]]  # of max_num_batched_tokens, likewise

    max_num_seqs: int
    max_num_batched_tokens: int
    page_size: int
    dtype: str
    cache_bytes: int = 0  # the most the cache takes unless asked for more; 0 is all that fits
    # compiler_options(tokens): XLA's, for a program that runs this many tokens
    compiler_options: Callable[[int], Mapping[str, bool | int | str]] = lambda tokens: {}
    # compile(engine.programs.Job) -> what is called, where XLA does not run the programs
    compile: Callable[[Any], Any] | None = None
    # put(array, axis=None): an array to where those find it, cut among cores along axis, if any
    put: Callable[..., Any] = jax.device_put
    cores: int = 0  # for a mesh of cores that are no devices of jax: how many there may be
    close: Callable[[], None] = lambda: None  # when the engine is closed
    autotuning: str = ""  # XLA's option for a folder that keeps what it found by trying
    # What its compiler cannot do; docs/design.md section 7.
    mixed: bool = True  # decode rows and prompt chunks in one program
    most_chunks: int = 32  # prompt chunks in one step, and admissions
    # Conditionals, infinities, loops that end when the device says so, integers across devices.
    branches: bool = True
    dense_experts: bool = False  # every expert meets every token
    # Of the pages of the longest sequence: how many a program looks at, ascending, the last is it.
    context_buckets: Callable[[int], tuple[int, ...]] = lambda pages: (pages,)
    # A model of fewer bytes than `small_model` decodes faster than the host can dispatch: its row
    # buckets are `small_rows` up to the most, and it runs `small_steps` decode steps in a program.
    # Its steps of fewer prompt tokens than `small_tokens` would take as long as those.
    small_model: int = 0
    small_rows: tuple[int, ...] = (1,)
    small_tokens: int = 0
    small_steps: int = 1
    # Any model over a mesh, whose every step the host hands to each device: so many steps in one
    # program, in these row buckets up to the most.
    mesh_steps: int = 1
    mesh_rows: tuple[int, ...] = ()  # (): `row_buckets`
    # XLA's options besides, for a program over a mesh that runs so many tokens
    mesh_options: Callable[[int], Mapping[str, str]] = lambda tokens: {}
    whole_steps: bool = False  # a decode step is one program: forward and sampling together

    memory_limit: Callable[[], int]  # bytes this process may still take on the first device
    shared_memory: bool = False  # all devices have the same memory
    # check_jobs(engine.programs.Job, ...): raises where its compiler cannot be asked for so many
    check_jobs: Callable[[Sequence[Any]], None] = lambda jobs: None
    # why_not(config): why an EngineConfig-like object cannot be served here, and what to change
    why_not: Callable[[Any], str | None]


def up_to(sizes: tuple[int, ...], most: int) -> tuple[int, ...]:
    """The buckets below `most`, and `most` itself."""
    return (*(size for size in sizes if size < most), most)


def doubling(first: int, last: int, factor: int = 2) -> tuple[int, ...]:
    """first, first * factor, ... and `last` itself, which may lie between two of them."""
    sizes = []
    while first < last:
        sizes.append(first)
        first *= factor
    return (*sizes, last)
