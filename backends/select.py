"""Which backend runs here."""

import os
from contextlib import suppress

import jax

from octavo.backends import cpu, gpu, gpu_choices, tpu
from octavo.backends.neuron import choose
from octavo.backends.record import Backend, BackendError


def select(device: str = "auto", count: int = 1) -> Backend:
    """The backend for `device` (auto, cpu, gpu, tpu or neuron), which says why it was chosen.

    count: devices that a mesh needs. A CPU is as many as jax is asked for before it starts.

    Raises BackendError where jax sees no such device, or Octavo has no backend for it.
    """
    # The pool's size is ours to decide, so JAX takes nearly all; it reads this when it starts.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    # Conditionals outside of command buffers make the host wait for their predicate.
    flags = os.environ.get("XLA_FLAGS", "")
    if device in ("auto", "gpu") and "command_buffer" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_enable_command_buffer=+CONDITIONAL".strip()
    if count > max(1, getattr(jax.config, "jax_num_cpu_devices", -1)):
        with suppress(RuntimeError):  # it has started: what it has is what there is
            jax.config.update("jax_num_cpu_devices", count)
    found = jax.default_backend()
    asked = f"--device {device}"
    if device == "auto":
        device, asked = found, f"{found} is the platform jax found first"
    if device == "cpu":
        return cpu.backend(f"cpu: blockwise attention in plain jnp ({asked})")
    if device == "gpu":
        if found != "gpu":
            raise BackendError(
                f"no gpu is visible to jax, which found {found}; "
                "install octavo[cuda], or use --device cpu"
            )
        choices = gpu_choices.read(os.environ.get(gpu_choices.VARIABLE, ""))
        return gpu.backend(f"gpu: our own paged attention, XLA for the rest ({asked})", choices)
    if device == "tpu":
        if found != "tpu":
            raise BackendError(
                f"no tpu is visible to jax, which found {found}; "
                "install octavo[tpu] on a TPU VM, or use --device cpu"
            )
        return tpu.backend(f"tpu: our own paged attention, XLA for the rest ({asked})")
    if device == "neuron":
        return choose.backend(asked)
    raise BackendError(f"no backend record for {device} yet; use --device cpu")
