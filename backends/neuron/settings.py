"""What the environment says of Neuron: the variables of docs/neuron.md."""

import os
import shlex
import sys
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from octavo.backends.neuron import detect
from octavo.backends.neuron.cache import NeffCache
from octavo.backends.neuron.compiler import TIME_LIMIT, Compiler
from octavo.backends.neuron.errors import NeuronError

EXECUTORS = ("auto", "pjrt", "aot")


class BadSetting(NeuronError):
    """A variable that says nothing."""

    def __init__(self, name: str, value: str, wanted: str) -> None:
        super().__init__(f"`{name}` is {value!r}", f"use {wanted}, or leave it unset")


@dataclass(frozen=True)
class Settings:
    """The variables, read once."""

    executor: str  # OCTAVO_NEURON_EXECUTOR
    libnrt: str  # OCTAVO_NEURON_LIBNRT
    cache: Path  # OCTAVO_NEURON_CACHE
    require_cached: bool  # OCTAVO_NEURON_REQUIRE_CACHED
    retry_failed: bool  # OCTAVO_NEURON_RETRY_FAILED
    flags: tuple[str, ...]  # OCTAVO_NEURON_CC_FLAGS
    time_limit: float  # OCTAVO_NEURON_COMPILE_TIMEOUT, seconds
    jobs: int  # OCTAVO_NEURON_COMPILE_JOBS; 0 is one for every four processors
    lnc: int  # NEURON_LOGICAL_NC_CONFIG; 0 is the target's default

    @staticmethod
    def read() -> "Settings":
        """Raises BadSetting."""
        executor = os.environ.get("OCTAVO_NEURON_EXECUTOR", "auto")
        if executor not in EXECUTORS:
            raise BadSetting("OCTAVO_NEURON_EXECUTOR", executor, "auto, pjrt or aot")
        default = Path.home() / ".cache" / "octavo" / "neffs"
        return Settings(
            executor=executor,
            libnrt=detect.libnrt_path(),
            cache=Path(os.environ.get("OCTAVO_NEURON_CACHE") or default),
            require_cached=_switch("OCTAVO_NEURON_REQUIRE_CACHED"),
            retry_failed=_switch("OCTAVO_NEURON_RETRY_FAILED"),
            flags=tuple(shlex.split(os.environ.get("OCTAVO_NEURON_CC_FLAGS", ""))),
            time_limit=_number("OCTAVO_NEURON_COMPILE_TIMEOUT", TIME_LIMIT),
            jobs=int(_number("OCTAVO_NEURON_COMPILE_JOBS", 0)),
            lnc=int(_number("NEURON_LOGICAL_NC_CONFIG", 0)),
        )

    def open_cache(self, root: Path | None = None) -> NeffCache:
        """The cache, with the compiler of this machine where it has one."""
        return NeffCache(
            root or self.cache,
            self.compiler(),
            require_cached=self.require_cached,
            retry_failed=self.retry_failed,
        )

    def compiler(self) -> Compiler | None:
        """AWS's compiler, or None. Raises StubPackage where there is only its name."""
        program = detect.compiler_path()
        if program is None:
            return None
        command = [sys.executable, program] if program.endswith(".py") else [program]
        version = compiler_version(Path(program))
        return Compiler(command, version, time_limit=self.time_limit, jobs=self.jobs)


def compiler_version(program: Path) -> str:
    """AWS's version; of a program that the user names, which may live in an environment of its own,
    a digest of that program. Raises StubPackage or PackageMissing."""
    if "OCTAVO_NEURON_COMPILER" in os.environ:
        return f"{program.stem}-{sha256(program.read_bytes()).hexdigest()[:12]}"
    return f"neuronxcc-{detect.package_version('neuronxcc', 'neuronx-cc')}"


def _switch(name: str) -> bool:
    value = os.environ.get(name, "0").lower()
    if value not in ("", "0", "1", "true", "false"):
        raise BadSetting(name, value, "1 or 0")
    return value in ("1", "true")


def _number(name: str, default: float) -> float:
    value = os.environ.get(name, "")
    try:
        return float(value) if value else default
    except ValueError:
        raise BadSetting(name, value, "a number") from None
