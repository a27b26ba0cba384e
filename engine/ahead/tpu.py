"""Plan and compile for TPUs that are not here: from a config.json to programs and a report."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding

from octavo.backends import tpu
from octavo.backends.chips import CHIPS, Chip
from octavo.backends.record import Backend, BackendError
from octavo.backends.topology import chips_of, devices_of
from octavo.engine.ahead import attention
from octavo.engine.ahead.report import Attention, Program, Report
from octavo.engine.ahead.wanted import Wanted, facts_of
from octavo.engine.assemble import cache_maker, limits_of, refusals
from octavo.engine.config import ConfigError, EngineConfig
from octavo.engine.memory import Resolved, resolve
from octavo.engine.planning import check_workspace
from octavo.engine.prepare import readable
from octavo.engine.programs import Programs
from octavo.engine.step import Machine
from octavo.pallas_kernels.attention import tpu as tpu_kernels


def plan(wanted: Wanted) -> Report:
    """What fits, by the sizes alone: nothing is compiled, and libtpu is not needed."""
    chip = CHIPS[wanted.chip]
    with refusals(), _backend_refusals():
        count = math.prod(chips_of(chip, wanted.topology)) * chip.devices
        config = _with_mesh(readable(wanted.config), count)
        resolved = _sizes(config, _backend(chip, wanted.topology, (None,) * count))
    return Report(chip, wanted.topology, resolved)


def compile(wanted: Wanted) -> Report:
    """Compile every program, keep them in `wanted.output`, and say what they are."""
    chip = CHIPS[wanted.chip]
    assert wanted.output is not None
    with refusals(), _backend_refusals():
        devices = devices_of(chip, wanted.topology)
        config = _with_mesh(readable(wanted.config), len(devices))
        backend = _backend(chip, wanted.topology, devices)
        resolved = _sizes(config, backend)
        folder = _folder(wanted.output)
    mesh = resolved.mesh or Mesh(np.array(devices[:1]), ("model",), axis_types=(AxisType.Auto,))
    programs = Programs(
        Machine(resolved.dims, resolved.model, backend, resolved.mesh),
        limits_of(config, resolved),
        config.max_logprobs,
        folder,
        elsewhere=NamedSharding(mesh, jax.P()),
    )
    weights = resolved.model.abstract_params(resolved.dtype)
    try:
        with jax.set_mesh(mesh):  # kernels ask it for the chip that they are lowered for
            programs.compile(weights, cache_maker(backend, resolved), wanted.progress)
    except jax.errors.JaxRuntimeError as error:
        raise _does_not_compile(error) from error
    resolved = replace(resolved, memory=check_workspace(resolved, programs.workspace()))
    loops = resolved.model.local_sizes["L"]
    measured = [Program.of(name, made, loops) for name, made in programs.made.items()]
    report = Report(chip, wanted.topology, resolved, measured, folder, _attention(chip, resolved))
    (folder / "report.json").write_text(json.dumps(report.as_json(), indent=2) + "\n")
    return report


def _attention(chip: Chip, resolved: Resolved) -> Attention | None:
    """What the kernels cost for these heads, pages and lengths; None for pages of other kinds."""
    dims, kind = resolved.dims, resolved.kv_dtype.name
    if kind not in attention.KINDS:
        return None
    ((_, numbers),) = attention.costs(
        chip.name,
        heads=resolved.model.attention,
        kinds=(kind,),
        pages=(dims.page_size,),
        longest=dims.max_len,
    )
    return Attention(
        **{name: numbers[name] for name in ("decode", "copies", "prefill")},
        spills=numbers["decode spills"] + numbers["prefill spills"],
        tokens=attention.TOKENS,
        cores=tpu_kernels.chip(chip.name).get("cores", 1),
    )


@contextmanager
def _backend_refusals() -> Iterator[None]:
    """What hardware cannot do is the user's to mend, as a wrong setting is."""
    try:
        yield
    except BackendError as error:
        raise ConfigError(str(error)) from None


def _with_mesh(config: EngineConfig, devices: int) -> EngineConfig:
    """The settings with a mesh over all devices, unless they name one."""
    if config.mesh or devices == 1:
        return config
    return replace(config, mesh=f"model={devices}")


def _backend(chip: Chip, topology: str, devices: tuple[Any, ...]) -> Backend:
    reason = f"tpu: compiled for {chip.name}:{topology}, which is not here"
    return tpu.record(reason, devices, lambda: chip.memory, chip)


def _sizes(config: EngineConfig, backend: Backend) -> Resolved:
    """Every size of the engine. Raises ConfigError for what cannot be served there."""
    instead = "it compiles in seconds where it is served: leave out --target"
    return resolve(config, backend, facts_of(config, instead))


def _folder(path: Path) -> Path:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ConfigError(
            f"`--output` {path} cannot be written: {reason}", "give a folder that can"
        ) from None
    return path


def _does_not_compile(error: Exception) -> Exception:
    """The compiler's own words are for us, but for memory, which is the user's to mend."""
    text = str(error)
    if "RESOURCE_EXHAUSTED" not in text:
        return error
    return ConfigError(
        f"the compiler finds no room for a step: {text.splitlines()[0].partition(': ')[2]}",
        "use a smaller --max-num-batched-tokens, a smaller --num-pages or fewer --max-num-seqs",
    )
