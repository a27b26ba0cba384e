"""What a compiled program depends on besides itself: the device, its driver, XLA's settings."""

import os
import platform
from functools import cache
from importlib import metadata
from pathlib import Path

import jax

SETTINGS = (
    "jax_default_matmul_precision",
    "jax_default_prng_impl",
    "jax_enable_x64",
    "jax_numpy_dtype_promotion",
    "jax_threefry_partitionable",
)


def identity(devices: tuple[jax.Device, ...] = ()) -> tuple[object, ...]:
    """Two processes of equal identity can run each other's programs. Its repr is complete.

    `devices` are those that a program runs on, all of this process without.
    """
    devices = devices or tuple(jax.devices())
    device = devices[0]
    return (
        jax.__version__,
        metadata.version("jaxlib"),
        device.platform,
        device.device_kind,
        device.client.platform_version,
        len(devices),
        _processor() if device.platform == "cpu" else "",
        [(name, str(jax.config.values.get(name))) for name in SETTINGS],
        [_flags(name, device.platform) for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")],
        os.environ.get("OCTAVO_GPU", ""),
    )


def _flags(name: str, kind: str) -> str:
    """An environment variable's flags, those for another kind of device left out."""
    words = os.environ.get(name, "").split()
    return " ".join(w for w in words if kind == "gpu" or not w.startswith("--xla_gpu"))


@cache
def _processor() -> str:
    """What compiled code for this processor may use."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor()
    kept = {line for line in lines if line.startswith(("model name", "flags", "Features"))}
    return repr(sorted(kept))
