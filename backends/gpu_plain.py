"""An NVIDIA GPU through plain XLA: complete, and far from fast. Our own kernels will replace it."""

from typing import Any

import jax

from octavo.backends import plain
from octavo.backends.cpu import more_than_one_device
from octavo.backends.record import Backend, doubling
from octavo.pallas_kernels.attention import blockwise


def backend(reason: str) -> Backend:
    """The record."""
    device = jax.devices("gpu")[0]

    def free_memory() -> int:
        stats = device.memory_stats() or {}
        return int(stats.get("bytes_limit", 0)) - int(stats.get("bytes_in_use", 0))

    return Backend(
        name="gpu-plain",
        reason=reason,
        devices=(device,),
        attend=blockwise.attend,
        init_cache=plain.init_cache,
        page_bytes=plain.page_bytes,
        linear=plain.linear,
        grouped_linear=plain.grouped_linear,
        layers=plain.layers,
        row_buckets=lambda most: doubling(min(8, most), most, 4),
        token_buckets=lambda most: doubling(min(128, most), most, 4),
        max_num_seqs=128,
        max_num_batched_tokens=2048,
        page_size=16,
        dtype="bfloat16",
        fused=True,
        memory_limit=free_memory,
        why_not=why_not,
    )


def why_not(config: Any) -> str | None:
    """The reason this backend cannot serve `config`, or None."""
    if more_than_one_device(config.mesh):
        return f"the gpu backend runs on one device, got `mesh={config.mesh}`; leave `mesh` empty"
    return None
