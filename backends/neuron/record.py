"""The backend record of a Neuron target: what its step looks like, wherever it is made."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax

from octavo.backends.neuron import ops, targets
from octavo.backends.neuron.export import Job, can_export
from octavo.backends.record import Backend, cache_dtype, doubling

DTYPE = "bfloat16"
PAGE = 32  # tokens: a gathered page is one contiguous copy of S * K * D numbers
FIRST_CONTEXT = 1024  # tokens that the smallest programs look at
MOST_LOGPROBS = 20  # found one after another: a step's time grows with them


def record(
    target: targets.Target,
    reason: str,
    devices: tuple[jax.Device, ...] = (),
    memory_limit: Callable[[], int] | None = None,
) -> Backend:
    """The record for a target; with no devices it only exports."""
    return Backend(
        name="neuron",
        reason=reason,
        devices=devices,
        attend=ops.attend,
        init_cache=ops.init_cache,
        page_bytes=ops.page_bytes,
        linear=ops.linear,
        grouped_linear=ops.grouped_linear,
        layers=ops.layers,
        row_buckets=lambda most: doubling(1, most, 16),
        token_buckets=lambda most: doubling(min(128, most), most, 4),
        max_num_seqs=16,
        max_num_batched_tokens=512,
        page_size=PAGE,
        dtype=DTYPE,
        cores=max(target.tensor_parallel),
        mixed=False,
        most_chunks=1,
        branches=False,
        dense_experts=True,
        context_buckets=_contexts,
        memory_limit=memory_limit or (lambda: int(target.usable)),
        check_jobs=_check_jobs,
        why_not=partial(why_not, target),
    )


def _check_jobs(jobs: Sequence[Job]) -> None:
    """Raises TooManyGraphs, before the first of them is compiled."""
    targets.check_graphs([job.name for job in jobs if can_export(job)])


def _contexts(pages: int) -> tuple[int, ...]:
    """A short context and the longest: each is a set of programs that AWS compiles for minutes."""
    first = FIRST_CONTEXT // PAGE
    return (first, pages) if 2 * first <= pages else (pages,)


def why_not(target: targets.Target, config: Any) -> str | None:
    """The reason this backend cannot serve `config`, or None. Raises UnsupportedDtype."""
    dtype = DTYPE if config.dtype == "auto" else str(config.dtype)
    cached = cache_dtype(config, dtype)
    targets.check_dtype(target, dtype)
    targets.check_dtype(target, cached, "kv_cache_dtype")
    if cached not in targets.FLOATS:
        return (
            "a Neuron core keeps keys and values in 16 or 32 bits, got "
            f"`kv_cache_dtype={config.kv_cache_dtype}`; use --kv-cache-dtype auto"
        )
    if not 0 <= config.max_logprobs <= MOST_LOGPROBS:
        return (
            f"a Neuron graph finds the likeliest tokens one by one, at most {MOST_LOGPROBS}, "
            f"got `max_logprobs={config.max_logprobs}`; use --max-logprobs {MOST_LOGPROBS}"
        )
    return None
