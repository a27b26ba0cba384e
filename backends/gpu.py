"""An NVIDIA GPU: our own Pallas kernels for attention, experts, gate and up; XLA for the rest."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp

from octavo.backends import plain
from octavo.backends.gpu_choices import Choices
from octavo.backends.record import Backend, up_to
from octavo.pallas_kernels.attention import blockwise, gpu
from octavo.pallas_kernels.attention.batch import RaggedBatch
from octavo.pallas_kernels.attention.reference import KV
from octavo.pallas_kernels.gated import gpu as gated
from octavo.pallas_kernels.grouped import gpu as grouped

ROWS = (1, 8, 32, 64, 128, 256, 512, 1024)
TOKENS = (128, 256, 512, 1024, 2048, 4096, 8192)
GB = 10**9
LARGE = 1 << 25  # elements of a weight
CHOICES = Choices()
# For steps over several devices: sums are recorded into one graph with all else. Of few tokens they
# are NCCL's, 7 us for 8 rows and 32 for 256, where XLA's own kernel takes 21 and 24. The lists
# replace XLA's: without ALL_REDUCE its kernel is off; there is no other way to say so.
GRAPHS = {
    "xla_gpu_enable_command_buffer": (
        "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,COLLECTIVES"
    )
}
NCCL = {"xla_gpu_experimental_use_collective_kernels": "COLLECTIVE_KERNEL_ALL_GATHER"}
NCCL_TOKENS = 64


def backend(reason: str, choices: Choices = CHOICES) -> Backend:
    """The record."""
    device = jax.local_devices(backend="gpu")[0]
    capability = capability_of(device)
    free = _free_memory(device)
    return Backend(
        name="gpu",
        reason=reason,
        devices=tuple(jax.devices("gpu")),
        attend=partial(attend, capability=capability, tuning=choices.tuning),
        attend_packed=partial(attend_packed, choices=choices, capability=capability),
        gated_linear=partial(gated_linear, choices=choices, capability=capability),
        init_cache=plain.init_cache,
        page_bytes=plain.page_bytes,
        linear=partial(linear, choices=choices),
        grouped_linear=partial(grouped_linear, capability=capability),
        layers=plain.layers,
        row_buckets=lambda most: up_to(ROWS, most),
        token_buckets=lambda most: up_to(TOKENS, most),
        max_num_seqs=256,
        max_num_batched_tokens=8192 if free() > 40 * GB else 2048,
        page_size=64,
        dtype="bfloat16",
        compiler_options=partial(compiler_options, choices),
        most_chunks=64,  # a step of 8,192 tokens may be 64 short prompts
        # A dispatch costs the host 1.5 to 2.5 ms; 4 GB are read in 1.3.
        small_model=4 * GB,
        autotuning="xla_gpu_per_fusion_autotune_cache_dir",
        small_rows=(8, 64, 256),
        small_tokens=512,
        small_steps=4,
        mesh_steps=4,
        mesh_rows=(8, 32, 64, 128, 256),
        mesh_options=mesh_options,
        memory_limit=free,
        why_not=partial(why_not, capability=capability),
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
    capability: gpu.Capability,
    tuning: gpu.Tuning = gpu.TUNING,
) -> tuple[jax.Array, KV]:
    """Our kernels where they take the step, plain XLA where they refuse it."""
    static: dict[str, Any] = {"window": window, "scale": scale, "softcap": softcap}
    static |= {"sinks": sinks, "kv_scales": kv_scales}
    if gpu.why_not(q, cache, batch, capability) is not None:
        return blockwise.attend(q, k, v, cache, batch, **static)
    return gpu.attend(q, k, v, cache, batch, **static, capability=capability, tuning=tuning)


def attend_packed(
    mixed: jax.Array,
    turn: tuple[jax.Array, jax.Array],
    norms: jax.Array | None,
    cache: KV,
    batch: RaggedBatch,
    *,
    choices: Choices,
    capability: gpu.Capability,
    **static: Any,
) -> tuple[jax.Array, KV] | None:
    """Norms, rotation and attention of decode rows in one kernel; None where it refuses them."""
    if not 0 < mixed.shape[0] <= choices.packed:
        return None
    if gpu.why_not_packed(mixed, cache, batch, capability) is not None:
        return None
    return gpu.attend_packed(mixed, turn, norms, cache, batch, **static, tuning=choices.tuning)


def gated_linear(
    x: jax.Array,
    layer: plain.Projection,
    act: str,
    *,
    choices: Choices,
    capability: gpu.Capability,
) -> jax.Array | None:
    """Both projections and their activation in one kernel; None where XLA's are as good."""
    if x.shape[0] < choices.gated_from or layer.bias is not None:
        return None
    weight = layer.weight.reshape(x.shape[1], -1)
    if gated.why_not(x, weight, act, capability) is not None:
        return None
    return gated.gated_linear(x, weight, act)


def linear(x: jax.Array, layer: plain.Projection, *, choices: Choices) -> jax.Array:
    """x [N, in] -> [N, out...]. cuBLAS too cuts the depth of a product like `down` of 256 rows to
    fill the device, but sums the parts slower than XLA does."""
    N, weight = x.shape[0], layer.weight
    long = weight.ndim == 2 and weight.shape[0] >= 3 * weight.shape[1] and weight.size >= LARGE
    if not (choices.cublas_from < N <= choices.halved and long and weight.shape[0] % 128 == 0):
        return plain.linear(x, layer)
    halves = x.reshape(N, 2, -1), weight.reshape(2, -1, weight.shape[1])
    y = jnp.einsum("npi,pio->pno", *halves, preferred_element_type=jnp.float32)
    y = (y[0] + y[1]).astype(x.dtype)
    return y if layer.bias is None else y + layer.bias


def grouped_linear(
    x: jax.Array,
    weight: jax.Array,
    sizes: jax.Array,
    first: jax.Array | int = 0,
    *,
    capability: gpu.Capability,
) -> jax.Array:
    """Our kernel for experts where it takes their shapes, a loop of XLA where it refuses them."""
    if grouped.why_not(x, weight, capability) is not None:
        return plain.grouped_linear(x, weight, sizes, first)
    return grouped.grouped_linear(x, weight, sizes, first)


def capability_of(device: jax.Device) -> gpu.Capability:
    """Of a CUDA device, such as (9, 0); (0, 0) where it does not say."""
    parts = str(getattr(device, "compute_capability", "0.0")).split(".")
    return int(parts[0]), int(parts[1])


def compiler_options(choices: Choices, tokens: int) -> dict[str, bool | int | str]:
    """XLA's options for a program that runs `tokens` tokens."""
    cublas = {"xla_gpu_enable_triton_gemm": False} if tokens >= choices.cublas_from else {}
    return {**cublas, **dict(choices.xla)}


def mesh_options(tokens: int) -> dict[str, str]:
    """XLA's options for a program over several devices that runs `tokens` tokens."""
    wanted = GRAPHS | NCCL if tokens <= NCCL_TOKENS else GRAPHS
    return {name: value for name, value in wanted.items() if _known(name, value)}


@cache
def _known(name: str, value: str) -> bool:
    """Whether this XLA has the option."""
    try:
        jax.jit(lambda: 0).lower().compile(compiler_options={name: value})
    except jax.errors.JaxRuntimeError:
        return False
    return True


def why_not(config: Any, capability: gpu.Capability) -> str | None:
    """The reason this backend cannot serve `config`, or None."""
    if config.kv_cache_dtype == "fp8" and capability < gpu.FLOAT8:
        return (
            f"a GPU of compute capability {capability[0]}.{capability[1]} has no 8-bit floats, "
            f"8.9 and later have, got `kv_cache_dtype=fp8`; use auto or int8"
        )
    return None


def _free_memory(device: jax.Device) -> Callable[[], int]:
    def free() -> int:
        stats = device.memory_stats() or {}
        return int(stats.get("bytes_limit", 0)) - int(stats.get("bytes_in_use", 0))

    return free
