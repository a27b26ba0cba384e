"""What fits, said before anything is allocated: weights, pages, workspace, sequences.

`resolve` turns a user's EngineConfig and a model's facts into the static sizes of the engine, or
refuses with the numbers and the settings that would make it fit.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from octavo.backends.record import Backend, cache_dtype, up_to
from octavo.engine.auto_mesh import sizes_of
from octavo.engine.config import ConfigError, EngineConfig
from octavo.engine.mesh import make_mesh, shards_of
from octavo.engine.plan import plan_size
from octavo.engine.state import BIAS, Dims, PageGroup
from octavo.models.config import ModelConfig
from octavo.models.load import param_bytes
from octavo.models.registry import Model, build
from octavo.pallas_kernels.sampling import NS

GiB = 1 << 30
MiB = 1 << 20
# Pages a window's sequence may hold beyond its window before a plan takes them back; scheduler.py.
WINDOW_SLACK = 5
# Of the longest prompts, a step that the backend sizes has room for no more than this many.
PROMPTS = 2


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by purpose on one device, and what they buy."""

    device: str
    limit: int  # what the device has for us
    usable: int  # the share the user allows
    weights: int
    cache: int
    state: int  # tables, histories, counts and plans
    workspace: int  # the largest program's temporary memory, estimated
    pages: tuple[int, ...]  # per group, the trash page included
    page_bytes: tuple[int, ...]  # per group
    page_size: int
    max_model_len: int
    max_num_seqs: int

    @property
    def total(self) -> int:
        """All that the engine takes."""
        return self.weights + self.cache + self.state + self.workspace

    @property
    def tokens(self) -> int:
        """Tokens that the key-value cache holds (of the group that sees everything)."""
        return (self.pages[0] - 1) * self.page_size

    def lines(self) -> list[str]:
        """A table for people."""
        whole = min(self.max_num_seqs, self.tokens // max(1, self.max_model_len))
        each = min(self.max_model_len, self.tokens // self.max_num_seqs)
        return [
            f"device     {size(self.limit):>10}   {self.device}, {size(self.usable)} of it usable",
            f"weights    {size(self.weights):>10}",
            f"cache      {size(self.cache):>10}   {self.tokens:,} tokens, {self.page_size} a page",
            f"state      {size(self.state):>10}   {self.max_num_seqs} slots",
            f"workspace  {size(self.workspace):>10}",
            f"total      {size(self.total):>10}",
            f"fits {whole} {'sequence' if whole == 1 else 'sequences'} of "
            f"{self.max_model_len:,} tokens, "
            f"or {self.max_num_seqs} of {each:,}",
        ]


@dataclass(frozen=True)
class Resolved:
    """All that was derived from the user's settings; logged, never asked for."""

    config: EngineConfig
    model: Model
    dims: Dims
    dtype: Any
    kv_dtype: Any
    row_buckets: tuple[int, ...]
    token_buckets: tuple[int, ...]
    max_model_len: int
    memory: MemoryPlan
    mesh: Any = None  # jax.sharding.Mesh; None is one device
    mesh_line: str = ""  # what is cut and why, for people
    steps: int = 1  # decode steps in one program
    several_rows: tuple[int, ...] = ()  # the row buckets that have such programs
    mixed: bool = True  # see backends.record
    context_buckets: tuple[int, ...] = ()  # pages that a program looks at

    @property
    def lanes(self) -> int:
        """Data shards: copies of the model, each with slots and pages of its own."""
        return 1 if self.mesh is None else int(self.mesh.shape["data"])


def size(count: float) -> str:
    """Bytes for people."""
    for unit, scale in (("GiB", GiB), ("MiB", MiB), ("KiB", 1024)):
        if abs(count) >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{int(count)} B"


def resolve(
    config: EngineConfig, backend: Backend, facts: ModelConfig, model: Model | None = None
) -> Resolved:
    """Decide every size. `model` replaces the one that `facts` would build (benches)."""
    if why := backend.why_not(config):
        raise ConfigError(why)
    dtype = jnp.dtype(backend.dtype if config.dtype == "auto" else config.dtype)
    limit = backend.memory_limit()
    sizes, mesh_line = sizes_of(config, backend, facts, dtype, limit)
    mesh = make_mesh(sizes, backend.devices, backend.cores)
    kv_dtype = jnp.dtype(cache_dtype(config, backend.dtype))
    facts = replace(facts, kv_scales=kv_dtype.itemsize == 1)
    seqs = config.max_num_seqs or backend.max_num_seqs
    page = config.page_size or backend.page_size
    longest = _longest(config, facts)
    budget = _budget(config, backend, longest, seqs)
    if isinstance(mesh, Mesh) and backend.shared_memory:
        limit //= len(mesh.local_devices)
    while True:
        built = model or build(facts, longest, shards_of(sizes), **_form(backend))
        weights = param_bytes(built, dtype)
        dims = _dims(backend, built, seqs, page, longest, budget)
        spent = weights + _state_bytes(dims) + _workspace_bytes(built, dims, dtype)
        usable = int(limit * config.memory_utilization)
        page_bytes = _page_bytes(backend, built, dims, kv_dtype)
        dims, shorter = _pages(config, backend, dims, page_bytes, usable - spent)
        if shorter == longest:
            break
        if config.max_model_len != "auto" or shorter < 2 * page:
            _check_num_pages(config, dims)
            raise _too_big(config, backend, limit, weights, spent, page_bytes, dims)
        longest = shorter
    _check_num_pages(config, dims)
    place = backend.name if mesh is None else f"each of {mesh.size} of {backend.name}"
    memory = _plan(place, limit, usable, built, dims, dtype, page_bytes)
    rows, several, steps = _rows(backend, seqs, weights, isinstance(mesh, Mesh))
    return Resolved(
        config=config,
        model=built,
        dims=dims,
        dtype=dtype,
        kv_dtype=kv_dtype,
        row_buckets=rows,
        token_buckets=_tokens(backend, budget, weights),
        max_model_len=longest,
        memory=memory,
        mesh=mesh,
        mesh_line=mesh_line,
        steps=steps,
        several_rows=several if steps > 1 else (),
        mixed=backend.mixed,
        context_buckets=backend.context_buckets(dims.pages_per_slot),
    )


def _plan(
    place: str,
    limit: int,
    usable: int,
    model: Model,
    dims: Dims,
    dtype: Any,
    page_bytes: tuple[int, ...],
) -> MemoryPlan:
    """What one device holds."""
    return MemoryPlan(
        device=place,
        limit=limit,
        usable=usable,
        weights=param_bytes(model, dtype),
        cache=sum(g.pages * b for g, b in zip(dims.groups, page_bytes, strict=True)),
        state=_state_bytes(dims),
        workspace=_workspace_bytes(model, dims, dtype),
        pages=tuple(g.pages for g in dims.groups),
        page_bytes=page_bytes,
        page_size=dims.page_size,
        max_model_len=dims.max_len,
        max_num_seqs=dims.slots,
    )


def _form(backend: Backend) -> dict[str, Any]:
    """How the backend wants a model's layers."""
    return {"stacked": backend.stacked, "columns": backend.columns}


def _rows(
    backend: Backend, seqs: int, weights: int, meshed: bool
) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """The row buckets, those that have programs of several decode steps, and how many these are."""
    if weights < backend.small_model:
        rows = up_to(backend.small_rows, seqs)
        return rows, rows, backend.small_steps
    rows = backend.row_buckets(seqs)
    if not meshed:
        return rows, (), 1
    if backend.mesh_rows:
        rows = up_to(backend.mesh_rows, seqs)
    return rows, rows if backend.mesh_steps > 1 else (), backend.mesh_steps


def _tokens(backend: Backend, budget: int, weights: int) -> tuple[int, ...]:
    """The buckets of prompt tokens."""
    buckets = backend.token_buckets(budget)
    least = backend.small_tokens if weights < backend.small_model else 0
    return tuple(n for n in buckets if n >= least) or buckets[-1:]


def _budget(config: EngineConfig, backend: Backend, longest: int, seqs: int) -> int:
    """Prompt tokens in one step."""
    budget = config.max_num_batched_tokens or backend.max_num_batched_tokens
    whole = 1 << (longest - 1).bit_length()
    return min(budget, whole * (1 if config.max_num_batched_tokens else min(seqs, PROMPTS)))


def _longest(config: EngineConfig, facts: ModelConfig) -> int:
    """The longest sequence before memory is asked."""
    if config.max_model_len == "auto":
        return facts.max_len
    asked = int(config.max_model_len)
    if asked > facts.max_len:
        raise ConfigError(
            f"`max_model_len` is {asked:,}, but the model was trained for {facts.max_len:,}; "
            f"use --max-model-len {facts.max_len}"
        )
    return asked


def _dims(backend: Backend, model: Model, seqs: int, page: int, longest: int, budget: int) -> Dims:
    windows: dict[int, int] = {}
    for spec in model.layer_specs:
        windows[spec.group] = spec.window
    return Dims(
        slots=seqs,
        page_size=page,
        max_len=longest,
        vocab=model.config.V,
        groups=tuple(PageGroup(windows[g], 0) for g in sorted(windows)),
        controls=NS,
        max_chunk=budget,
        chunks=backend.most_chunks,
    )


def _page_bytes(backend: Backend, model: Model, dims: Dims, dtype: Any) -> tuple[int, ...]:
    """Bytes of one page in all layers of each group."""
    _, heads, head = model.attention
    layers = [0] * len(dims.groups)
    for spec in model.layer_specs:
        layers[spec.group] += 1
    return tuple(backend.page_bytes(n, dims.page_size, heads, head, dtype) for n in layers)


def _pages(
    config: EngineConfig, backend: Backend, dims: Dims, page_bytes: tuple[int, ...], left: int
) -> tuple[Dims, int]:
    """Pages per group within `left` bytes, and the longest sequence that they then allow."""
    per_slot = dims.pages_per_slot
    most = dims.slots * per_slot + 1
    if backend.cache_bytes and not config.num_pages:
        asked = 0 if config.max_model_len == "auto" else (per_slot + 1) * sum(page_bytes)
        left = min(left, max(backend.cache_bytes, asked))
    wanted, fixed = [], 0
    for group, cost in zip(dims.groups, page_bytes, strict=True):
        want = most
        if group.window:
            span = -(-group.window // dims.page_size) + WINDOW_SLACK
            ahead = (config.steps_in_flight + 1) * -(-dims.max_chunk // dims.page_size)
            want = min(most, dims.slots * span + ahead + 1)
            if config.num_pages:
                want = min(want, config.num_pages)
            fixed += want * cost
        wanted.append(want)
    open_cost = sum(c for g, c in zip(dims.groups, page_bytes, strict=True) if not g.window)
    if open_cost:
        fits = max(0, left - fixed) // open_cost
        fits = config.num_pages if config.num_pages else fits
        wanted = [w if g.window else min(w, fits) for w, g in zip(wanted, dims.groups, strict=True)]
        enough = min(w for w, g in zip(wanted, dims.groups, strict=True) if not g.window)
        if config.num_pages and open_cost * enough + fixed > left:
            return dims, 0
    else:
        enough = most if fixed <= left else 0
    groups = tuple(PageGroup(g.window, w) for g, w in zip(dims.groups, wanted, strict=True))
    longest = min(dims.max_len, (enough - 1) * dims.page_size)
    return (
        Dims(**{**dims.__dict__, "groups": groups}),
        longest if longest < dims.max_len else dims.max_len,
    )


def _check_num_pages(config: EngineConfig, dims: Dims) -> None:
    """Refuse a `num_pages` with which one sequence alone could come to a standstill."""
    if not config.num_pages:
        return
    for group in dims.groups:
        least = dims.pages_per_slot
        if group.window:  # what a chunk sees and what it writes; admission.py asks for as much
            least = min(least, -(-(group.window + dims.max_chunk) // dims.page_size) + 1)
        if config.num_pages <= least:
            raise ConfigError(
                f"`num_pages` is {config.num_pages:,}, but one sequence of {dims.max_len:,} tokens "
                f"needs at least {least + 1:,}, the page that takes padding included",
                "use a larger --num-pages or a smaller --max-model-len; 0 takes what memory allows",
            )


def _state_bytes(dims: Dims) -> int:
    """Everything in the state but the cache, and two plans in flight."""
    rows = dims.slots + 1
    tables = dims.slots * dims.pages_per_slot * len(dims.groups)
    history = rows * dims.max_len
    bias = rows * BIAS * 2
    return 4 * (tables + history + bias + 4 * plan_size(dims)) + 2 * dims.slots * dims.vocab


def _workspace_bytes(model: Model, dims: Dims, dtype: Any) -> int:
    """An upper estimate of a step's temporary memory; the programs are asked once they exist."""
    heads, kv_heads, head = model.attention
    tokens = dims.slots + dims.max_chunk
    width = max(model.local.F * 2, (heads + 2 * kv_heads) * head, model.config.E * 4)
    logits = dims.slots * model.local.V * 4 * 4
    return tokens * width * 4 * 4 + logits + 64 * MiB


def _too_big(
    config: EngineConfig,
    backend: Backend,
    limit: int,
    weights: int,
    spent: int,
    page_bytes: tuple[int, ...],
    dims: Dims,
) -> ConfigError:
    """Why no engine of these sizes can be, with the numbers and what to write instead."""
    usable = int(limit * config.memory_utilization)
    least, asked = dims.pages_per_slot + 1, config.num_pages
    left = max(0, usable - spent)
    if asked and usable > spent:
        return ConfigError(
            f"`num_pages` is {asked:,}, which take {size(asked * sum(page_bytes))}, but "
            f"{size(left)} are left of the {size(usable)} usable",
            f"--num-pages {left // sum(page_bytes)}, or 0 for what memory allows",
        )
    smaller = "" if config.dtype in ("bfloat16", "float16") else ", --dtype bfloat16"
    hint = f"a smaller --max-model-len, fewer --max-num-seqs{smaller}, or a larger device"
    if usable < weights:
        hint = f"a smaller model{smaller}, or a larger device"
    return ConfigError(
        f"the model does not fit: {size(weights)} of weights and {size(spent - weights)} of "
        f"workspace leave {size(left)} of the {size(usable)} usable ({size(limit)} on "
        f"{backend.name}), and one sequence of {dims.max_len:,} tokens needs "
        f"{size(least * sum(page_bytes))} of cache",
        hint,
    )
