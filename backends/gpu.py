"""An NVIDIA GPU: our own Pallas kernels for attention, XLA for everything else."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax

from octavo.backends import plain
from octavo.backends.record import CACHE_DTYPES, Backend
from octavo.pallas_kernels.attention import blockwise, gpu
from octavo.pallas_kernels.attention.batch import RaggedBatch
from octavo.pallas_kernels.attention.reference import KV

ROWS = (1, 8, 32, 64, 128, 256, 512, 1024)
TOKENS = (128, 256, 512, 1024, 2048, 4096, 8192)
GB = 10**9
# Tokens from which XLA's own matrix products are behind cuBLAS's, and cost longer to compile.
MANY = 128


def backend(reason: str) -> Backend:
    """The record."""
    device = jax.local_devices(backend="gpu")[0]
    hopper = str(getattr(device, "compute_capability", "")) == "9.0"
    free = _free_memory(device)
    return Backend(
        name="gpu",
        reason=reason,
        devices=tuple(jax.devices("gpu")),
        attend=partial(attend, hopper=hopper),
        init_cache=plain.init_cache,
        page_bytes=plain.page_bytes,
        linear=plain.linear,
        grouped_linear=plain.grouped_linear,
        layers=plain.layers,
        row_buckets=lambda most: _up_to(ROWS, most),
        token_buckets=lambda most: _up_to(TOKENS, most),
        max_num_seqs=256,
        max_num_batched_tokens=8192 if free() > 40 * GB else 2048,
        page_size=64,
        dtype="bfloat16",
        compiler_options=compiler_options,
        # A dispatch costs the host 1.5 to 2.5 ms; 4 GB are read in 1.3.
        small_model=4 * GB,
        autotuning="xla_gpu_per_fusion_autotune_cache_dir",
        small_rows=(8, 64, 256),
        small_steps=4,
        memory_limit=free,
        why_not=why_not,
    )


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cache: KV,
    batch: RaggedBatch,
    *,
    window: int,
    scale: float,
    softcap: float,
    sinks: jax.Array | None = None,
    kv_scales: jax.Array | None = None,
    hopper: bool,
) -> tuple[jax.Array, KV]:
    """Our kernels where they take the step, plain XLA where they refuse it."""
    static: dict[str, Any] = {"window": window, "scale": scale, "softcap": softcap}
    static |= {"sinks": sinks, "kv_scales": kv_scales}
    if gpu.why_not(q, cache, batch, sinks, kv_scales) is not None:
        return blockwise.attend(q, k, v, cache, batch, **static)
    return gpu.attend(q, k, v, cache, batch, **static, hopper=hopper)


def compiler_options(tokens: int) -> dict[str, bool | int | str]:
    """XLA's options for a program that runs `tokens` tokens."""
    return {"xla_gpu_enable_triton_gemm": False} if tokens >= MANY else {}


def why_not(config: Any) -> str | None:
    """The reason this backend cannot serve `config`, or None."""
    if config.kv_cache_dtype in CACHE_DTYPES:
        return (
            f"the gpu backend keeps keys and values in 16 or 32 bits, "
            f"got `kv_cache_dtype={config.kv_cache_dtype}`; use auto"
        )
    return None


def _up_to(sizes: tuple[int, ...], most: int) -> tuple[int, ...]:
    """The buckets below `most`, and `most` itself."""
    return (*(size for size in sizes if size < most), most)


def _free_memory(device: jax.Device) -> Callable[[], int]:
    def free() -> int:
        stats = device.memory_stats() or {}
        return int(stats.get("bytes_limit", 0)) - int(stats.get("bytes_in_use", 0))

    return free
