"""Which way this machine runs Neuron graphs, as a backend record."""

import os
from dataclasses import replace
from importlib import import_module
from typing import Any

import jax

from octavo.backends.neuron import detect, targets
from octavo.backends.neuron.errors import NoNeuronDevice
from octavo.backends.neuron.executors import Aot, Executor, Pjrt
from octavo.backends.neuron.record import record
from octavo.backends.neuron.runner import Cores
from octavo.backends.neuron.settings import Settings
from octavo.backends.record import Backend

# Serving wants the same answer twice, and an error instead of a core that waits for ever.
RUNTIME = {"NEURON_RT_STOCHASTIC_ROUNDING_EN": "0", "NEURON_RT_EXEC_TIMEOUT": "600"}
PJRT_FLAGS = "--model-type transformer --auto-cast none --enable-saturate-infinity"


def backend(asked: str, count: int = 1) -> Backend:
    """The record with its executor, for a mesh of `count` cores.

    Raises NeuronError: what is missing, and the next step.
    """
    settings = Settings.read()
    for name, value in RUNTIME.items():
        os.environ.setdefault(name, value)
    found = _pjrt(settings) if settings.executor != "aot" else None
    executor: Pjrt | Aot = found or _aot(settings, count)
    words = {"pjrt": "jax's neuron platform", "aot": "graphs compiled ahead, run by libnrt"}
    reason = f"neuron: {executor.target.chip}, {words[executor.name]} ({asked})"
    if isinstance(executor, Pjrt) and not executor.donates:
        reason += "; donation gave wrong numbers here, so every step copies the cache"
    return with_executor(executor, reason)


def with_executor(executor: Executor, reason: str) -> Backend:
    """The record of the executor's target."""
    made = record(executor.target, reason, memory_limit=executor.memory)
    return replace(
        made,
        close=executor.close,
        why_not=lambda config: made.why_not(config) or _why_not(config),
        **executor.fields(),
    )


def _why_not(config: Any) -> str | None:
    """What the records of every executor refuse."""
    if config.runner == "pooling":
        return (
            "models that only read texts are not served on Neuron yet, got `runner=pooling`; use "
            "--device cpu"
        )
    return None


def _pjrt(settings: Settings) -> Pjrt | None:
    """jax's platform, or None where it is not there and was not asked for by name."""
    try:
        detect.package_version("libneuronxla")
    except ValueError:
        if settings.executor == "pjrt":
            raise
        return None
    detect.check_jax(jax.__version__)
    os.environ.setdefault("NEURON_CC_FLAGS", PJRT_FLAGS)
    try:
        devices = tuple(jax.devices("neuron"))
    except RuntimeError as error:
        if settings.executor == "pjrt":
            raise NoNeuronDevice(str(error)) from None
        return None
    kind = devices[0].device_kind
    here = detect.find(load=import_module).target
    target = here or next((t for t in targets.TARGETS.values() if kind in t.kinds), None)
    if target is None:
        raise NoNeuronDevice(f"{kind} is no kind of core that is known")
    return Pjrt(target, devices)


def _aot(settings: Settings, count: int) -> Aot:
    """The runtime. Raises NoNeuronDevice or UnsupportedTP."""
    cores = Cores(settings.libnrt, count)
    try:
        family = cores.nrt.instance().family
        target = targets.of_family(family)
        if target is None:
            raise NoNeuronDevice(f"the runtime says this is an instance of family {family}")
        targets.check_parallel(target, count, count)  # heads are dealt out by the engine
        cache = settings.open_cache()
        return Aot(cores, cache, target, lnc=settings.lnc, flags=settings.flags)
    except BaseException:
        cores.close()
        raise
