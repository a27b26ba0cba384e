"""A TPU: our own Pallas kernels for attention and experts, XLA for everything else."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from octavo.backends import plain
from octavo.backends.chips import Chip, chip_of
from octavo.backends.record import Backend, Layer, cache_dtype, doubling
from octavo.models.layers import Experts
from octavo.models.ops import Stacks
from octavo.pallas_kernels.attention import tpu
from octavo.pallas_kernels.grouped import tpu as grouped

# A step scatters and gathers a few numbers a row: less work than starting another core for it, and
# programs for that core take longest to compile.
OPTIONS: dict[str, bool | int | str] = {
    "xla_tpu_enable_offloading_scatter_to_sparsecore": False,
    "xla_tpu_enable_offloading_gather_to_sparsecore": False,
}
PAGE = 32  # one tile of 8-bit keys; larger pages gain less than 5 % of a decode step's copies


def backend(reason: str) -> Backend:
    """The record of the TPUs that are here."""
    device = jax.local_devices(backend="tpu")[0]
    chip = chip_of(device.device_kind)
    return record(reason, tuple(jax.devices("tpu")), _free_memory(device), chip)


def record(
    reason: str,
    devices: tuple[jax.Device, ...],
    memory_limit: Callable[[], int],
    chip: Chip | None,
) -> Backend:
    """The record of any TPU; without devices, or with those of a topology, it serves nothing."""
    return Backend(
        name="tpu",
        reason=reason,
        devices=devices,
        attend=partial(tpu.attend, **tpu.chip(chip.name if chip else "")),
        init_cache=init_cache,
        page_bytes=tpu.page_bytes,
        linear=plain.linear,
        grouped_linear=grouped_linear,
        layers=layers,
        stacked=True,
        whole_steps=True,
        columns=chip.columns if chip else 0,
        row_buckets=lambda most: doubling(min(8, most), most),
        token_buckets=lambda most: doubling(min(128, most), most),
        max_num_seqs=128,
        max_num_batched_tokens=2048,
        page_size=PAGE,
        dtype="bfloat16",
        compiler_options=lambda tokens: OPTIONS,
        memory_limit=memory_limit,
        why_not=why_not,
    )


def init_cache(
    layers: Sequence[Layer],
    pages: Sequence[int],
    page_size: int,
    kv_heads: int,
    head_size: int,
    dtype: jax.typing.DTypeLike,
) -> tuple[tpu.TpuKV, ...]:
    """One `TpuKV` per page group, with the pages of all its layers."""
    counts = [sum(layer.group == group for layer in layers) for group in range(len(pages))]
    return tuple(
        tpu.init_kv(count, page_size, kv_heads, head_size, dtype, layers)
        for count, layers in zip(pages, counts, strict=True)
    )


def grouped_linear(
    x: jax.Array, weight: jax.Array, sizes: jax.Array, first: jax.Array | int = 0
) -> jax.Array:
    """Our kernel for experts where it takes their shapes, a loop of XLA where it refuses them."""
    if grouped.why_not(x, weight) is not None:
        return plain.grouped_linear(x, weight, sizes, first)
    return grouped.grouped_linear(x, weight, sizes, first)


def layers(
    block: Callable[[jax.Array, Any, Any, Any], tuple[jax.Array, Any]],
    x: jax.Array,
    params: Any,
    cache: Sequence[Any],
    specs: Sequence[Layer],
) -> tuple[jax.Array, tuple[Any, ...]]:
    """A loop over whole periods: each weight is read where it lies in its stack, and the pages of
    all layers go around in place. A program has few arguments then, however many the layers."""
    if not isinstance(params, Stacks):
        return plain.layers(block, x, params, cache, specs)
    block = jax.jit(block, static_argnums=3)
    groups = [spec.group for spec in specs]
    period, whole = len(params.periods), params.loops * len(params.periods)
    each = [groups[:period].count(group) for group in range(len(cache))]

    def one(x: jax.Array, pools: Any, w: Any, spec: Layer, layer: jax.Array) -> tuple[Any, Any]:
        x, kept = block(x, w, pools[spec.group].at(layer), spec)
        after = replace(kept, layer=None)
        return x, (*pools[: spec.group], after, *pools[spec.group + 1 :])

    def loop(carry: tuple[Any, Any], i: jax.Array) -> tuple[tuple[Any, Any], None]:
        x, pools = carry
        for j, (stack, spec) in enumerate(zip(params.periods, specs, strict=False)):
            layer = i * each[spec.group] + groups[:j].count(spec.group)
            x, pools = one(x, pools, cut(stack, i), spec, layer)
        return (x, pools), None

    steps = jnp.arange(params.loops, dtype=jnp.int32)
    (x, pools), _ = jax.lax.scan(loop, (x, tuple(cache)), steps)
    for j, w in enumerate(params.rest, whole):
        layer = jnp.int32(groups[:j].count(groups[j]))
        x, pools = one(x, pools, w, specs[j], layer)
    return x, pools


def cut(stack: Any, i: jax.Array) -> Any:
    """Layer i of a tree of stacked weights; experts stay in their stack, and know their layer."""

    def take(array: jax.Array) -> jax.Array:
        return jax.lax.dynamic_index_in_dim(array, i, keepdims=False)

    def one(node: Any) -> Any:
        return node.at(i, take) if isinstance(node, Experts) else take(node)

    return jax.tree.map(one, stack, is_leaf=lambda node: isinstance(node, Experts))


def why_not(config: Any) -> str | None:
    """The reason this backend cannot serve `config`, or None."""
    kind = cache_dtype(config, "bfloat16")
    if "float16" in (config.dtype, kind):
        return "a TPU has no float16 arithmetic; use bfloat16 as `dtype` and `kv_cache_dtype`"
    least = tpu.smallest_page(jnp.dtype(kind))
    if 0 < config.page_size < least:
        return (
            f"a page of {kind} holds at least {least} tokens on a TPU, "
            f"got `page_size={config.page_size}`; leave `page_size` at 0"
        )
    return None


def _free_memory(device: jax.Device) -> Callable[[], int]:
    def free() -> int:
        stats = device.memory_stats() or {}
        return int(stats.get("bytes_limit", 0)) - int(stats.get("bytes_in_use", 0))

    return free
