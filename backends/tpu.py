"""A TPU: our own Pallas kernels for attention, XLA for everything else."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from octavo.backends import plain
from octavo.backends.record import Backend, Layer, doubling
from octavo.pallas_kernels.attention import tpu

PAGE = 32  # one tile of 8-bit keys; larger pages gain less than 5 % of a decode step's copies


def backend(reason: str) -> Backend:
    """The record of the TPU that is here."""
    device = jax.local_devices(backend="tpu")[0]
    return record(reason, tuple(jax.devices("tpu")), _free_memory(device))


def record(
    reason: str, devices: tuple[jax.Device, ...], memory_limit: Callable[[], int]
) -> Backend:
    """The record of any TPU; with no devices it only compiles."""
    return Backend(
        name="tpu",
        reason=reason,
        devices=devices,
        attend=tpu.attend,
        init_cache=init_cache,
        page_bytes=tpu.page_bytes,
        linear=plain.linear,
        grouped_linear=plain.grouped_linear,
        layers=plain.layers,
        row_buckets=lambda most: doubling(min(8, most), most),
        token_buckets=lambda most: doubling(min(128, most), most),
        max_num_seqs=128,
        max_num_batched_tokens=2048,
        page_size=PAGE,
        dtype="bfloat16",
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
    """One `TpuKV` per layer."""
    return tuple(
        tpu.init_kv(pages[layer.group], page_size, kv_heads, head_size, dtype) for layer in layers
    )


def why_not(config: Any) -> str | None:
    """The reason this backend cannot serve `config`, or None."""
    kind = config.kv_cache_dtype
    if kind == "auto":
        kind = "bfloat16" if config.dtype == "auto" else config.dtype
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
