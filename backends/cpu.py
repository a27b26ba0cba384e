"""The CPU: the default on a machine without an accelerator. Plain jnp through XLA, no kernels."""

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from octavo.backends import plain
from octavo.backends.record import Backend, Layer, doubling
from octavo.models import ops
from octavo.pallas_kernels.attention import KV, blockwise
from octavo.pallas_kernels.attention.reference import BITS


def backend(reason: str) -> Backend:
    """The record."""
    return Backend(
        name="cpu",
        reason=reason,
        devices=tuple(jax.devices("cpu")),
        attend=blockwise.attend,
        init_cache=init_cache,
        page_bytes=plain.page_bytes,
        linear=linear,
        grouped_linear=partial(plain.grouped_linear, product=product),
        layers=plain.layers,
        head=head,
        row_buckets=lambda most: doubling(1, most),
        token_buckets=lambda most: doubling(min(32, most), most, 4),
        max_num_seqs=32,
        max_num_batched_tokens=512,
        page_size=16,
        dtype="float32",
        cache_bytes=2 << 30,  # the machine is used for other things too
        memory_limit=available_memory,
        shared_memory=True,
        why_not=why_not,
    )


def init_cache(
    layers: Sequence[Layer],
    pages: Sequence[int],
    page_size: int,
    kv_heads: int,
    head_size: int,
    dtype: jax.typing.DTypeLike,
) -> tuple[KV, ...]:
    """One `KV` per layer; small floats as their bits."""
    kept = BITS.get(jnp.dtype(dtype).name, dtype)
    return plain.init_cache(layers, pages, page_size, kv_heads, head_size, kept)


def linear(x: jax.Array, layer: plain.Projection) -> jax.Array:
    """x [N, in] -> [N, out...] in the dtype of x."""
    y = product(x, layer.weight)
    return y if layer.bias is None else y + layer.bias


def product(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x [N, in], weight [in, out...] -> [N, out...] in the dtype of x."""
    if x.dtype.itemsize > 2:
        return plain.product(x, weight)
    return plain.product(_two(x), weight, jnp.float32)[: len(x)].astype(x.dtype)


def head(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x [R, E], weight [V, E] -> f32[R, V]."""
    return ops.head(x if x.dtype.itemsize > 2 else _two(x), weight)[: len(x)]


def _two(x: jax.Array) -> jax.Array:
    """At least two rows: the products of 16 bits that XLA:CPU has fast code for have these and
    results of 32 bits. What it does with others takes eight times as long."""
    return jnp.pad(x, ((0, max(0, 2 - len(x))), (0, 0)))


def why_not(config: Any) -> str | None:
    """The reason this backend cannot serve `config`, or None."""
    return None


def available_memory(root: Path = Path("/")) -> int:
    """Bytes this process may still take: what is free, and what its container allows."""
    limits = [_machine(root), _cgroup(root)]
    return min(limit for limit in limits if limit is not None)


def _machine(root: Path) -> int:
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
    except OSError:  # not Linux
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    kib = {line.split(":")[0]: int(line.split()[1]) for line in lines if line}
    return kib.get("MemAvailable", kib["MemFree"]) * 1024


def _cgroup(root: Path) -> int | None:
    """What a container's limit leaves, or None without a limit; files of version 2, then 1.

    The file cache counts as used there, but the kernel gives its inactive part back when asked.
    """
    base = root / "sys/fs/cgroup"
    for folder, limit, used in (
        (base, "memory.max", "memory.current"),
        (base / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        try:
            most, now = (folder / limit).read_text().strip(), int((folder / used).read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue
        if most == "max":
            return None
        return max(0, int(most) - now + int(stat.get("inactive_file", 0)))
    return None
