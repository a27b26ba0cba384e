"""Two ways to run the step on Neuron cores, behind one interface.

`Pjrt`: jax's own `neuron` platform; the ordinary engine on its devices.
`Aot`: ahead of time. jax only traces, on the host; each program is exported, checked by the rules,
compiled by neuronx-cc or found compiled, and run by libnrt. Of AWS's software it needs the runtime
alone, and where everything was compiled elsewhere not even the compiler.
"""

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from octavo.backends.neuron import export, lint, targets
from octavo.backends.neuron.cache import NeffCache
from octavo.backends.neuron.compiler import options_for
from octavo.backends.neuron.errors import NoNeuronDevice
from octavo.backends.neuron.runner import Cores


class Job(export.Job, Protocol):
    """A program of the step (`engine.programs.Job` is one)."""

    @property
    def tokens(self) -> int: ...  # that it runs


class Executor(Protocol):
    """Where programs and arrays go."""

    @property
    def name(self) -> str: ...

    @property
    def target(self) -> targets.Target: ...

    def fields(self) -> dict[str, Any]:
        """What it gives to the target's `Backend`: where programs and arrays go."""

    def memory(self) -> int:
        """Bytes that may still be taken on the fullest core."""

    def close(self) -> None:
        """Give the device back."""


class Aot:
    """Graphs that were compiled by neuronx-cc, run through libnrt."""

    name = "aot"

    def __init__(
        self,
        cores: Cores,
        cache: NeffCache,
        target: targets.Target,
        *,
        lnc: int = 0,
        flags: tuple[str, ...] = (),
    ) -> None:
        targets.check_x64(bool(jax.config.values["jax_enable_x64"]))
        self.cores = cores
        self.cache = cache
        self.target = target
        self._lnc, self._flags = lnc, flags

    def fields(self) -> dict[str, Any]:
        """Programs and arrays are its own."""
        return {"compile": self.compile, "put": self.put, "cores": self.cores.ranks}

    def compile(self, job: Job) -> Callable[..., Any]:
        """Raises LintError, CompileFailed, CacheMiss, NrtError and others of `errors`."""
        if not export.can_export(job):
            return self._first_state(job)
        graph = export.export_job(job, self.cores.ranks)
        lint.check(graph.exported, self.target)
        options = options_for(self.target, job.tokens, self._lnc, self._flags)
        data = self.cache.get(graph.exported, options)
        return graph.call(self.cores.load(graph.exported, data))

    def _first_state(self, job: Job) -> Callable[[], Any]:
        """What makes the empty state is no graph: the cache becomes zeros where it lies, and the
        rest, which is small, is computed here."""
        kv = jax.eval_shape(job.function).kv
        rest = jax.jit(lambda: job.function().replace(kv=())).lower().compile()

        def empty() -> Any:
            state = jax.tree.map(lambda leaf: self.put(np.asarray(leaf)), rest())
            return state.replace(
                kv=jax.tree.map(lambda leaf: self.cores.zeros(leaf.shape, leaf.dtype), kv)
            )

        return empty

    def put(self, array: np.ndarray, axis: int | None = None) -> Any:
        """A copy to each core, or its part of it."""
        return self.cores.put(array, axis)

    def memory(self) -> int:
        """As the runtime has it."""
        used, limit = self.cores.memory()
        return int(limit * targets.USABLE) - used

    def close(self) -> None:
        """Free everything and give the cores back."""
        self.cores.close()


class Pjrt:
    """Programs of jax on its `neuron` platform."""

    name = "pjrt"

    def __init__(self, target: targets.Target, devices: tuple[jax.Device, ...]) -> None:
        """Raises NoNeuronDevice where there is none."""
        if not devices:
            raise NoNeuronDevice("jax sees none, although its plugin is there")
        targets.check_x64(bool(jax.config.values["jax_enable_x64"]))
        if jax.default_backend() != "neuron":
            jax.config.update("jax_default_device", devices[0])
        self.target = target
        self.devices = devices
        self.donates = donation_works(devices[0])

    def fields(self) -> dict[str, Any]:
        """Programs and arrays are jax's; donated arrays are copied where that was seen to fail."""
        return {"devices": self.devices, "donates": self.donates}

    def memory(self) -> int:
        """As the plugin has it, else what such a core is sold with."""
        stats = self.devices[0].memory_stats() or {}
        limit = int(stats.get("bytes_limit", 0)) or self.target.usable
        return limit - int(stats.get("bytes_in_use", 0))

    def close(self) -> None:
        """Nothing: the platform is jax's."""


def donation_works(device: jax.Device) -> bool:
    """Whether a donated array that is updated in place, call after call, holds what it should."""

    def step(cache: jax.Array, row: jax.Array, value: jax.Array) -> tuple[jax.Array, jax.Array]:
        cache = cache.at[row].set(value, mode="promise_in_bounds", unique_indices=True)
        return cache, jnp.sum(cache, axis=0)

    program = jax.jit(step, donate_argnums=0)
    cache = jax.device_put(np.zeros((8, 64), np.float32), device)
    wanted = np.zeros((8, 64), np.float32)
    for i in range(4):
        value = np.arange(64, dtype=np.float32)[None] + i
        row = np.array([(3 * i) % 8], np.int32)
        wanted[row] = value
        cache, total = program(cache, jax.device_put(row, device), jax.device_put(value, device))
        if not np.array_equal(np.asarray(total), wanted.sum(0)):
            return False
    return bool(np.array_equal(np.asarray(cache), wanted))
