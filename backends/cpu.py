"""The CPU: the default on a machine without an accelerator. Plain jnp through XLA, no kernels."""

import os
from pathlib import Path
from typing import Any

import jax

from octavo.backends import plain
from octavo.backends.record import Backend, doubling
from octavo.pallas_kernels.attention import blockwise


def backend(reason: str) -> Backend:
    """The record."""
    return Backend(
        name="cpu",
        reason=reason,
        devices=tuple(jax.devices("cpu")),
        attend=blockwise.attend,
        init_cache=plain.init_cache,
        page_bytes=plain.page_bytes,
        linear=plain.linear,
        grouped_linear=plain.grouped_linear,
        layers=plain.layers,
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
