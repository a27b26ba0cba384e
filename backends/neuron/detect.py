"""What of AWS Neuron this machine has: devices, driver, runtime, compiler, plugin; no jax.

The packages that other indexes hold under AWS's names are stubs which raise on import, and some
install nothing that could be imported at all while their metadata is there. So a package counts
only when its module is imported and has a version of AWS's.
"""

import ctypes
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from octavo.backends.neuron import targets
from octavo.backends.neuron.errors import (
    JaxPinMismatch,
    NeuronError,
    NoNeuronDevice,
    PackageMissing,
    StubPackage,
)

JAX = "0.10.0"  # what AWS's plugin is made for
LIBNRT = "/opt/aws/neuron/lib/libnrt.so.1"
PRODUCT = Path("sys/devices/virtual/dmi/id/product_name")
DRIVER = Path("sys/module/neuron/version")
STUB = "WRONG PACKAGE"  # what the stubs say
OLDEST_COMPILER = 2

Import = Callable[[str], Any]


@dataclass(frozen=True)
class Found:
    """What there is. A problem is the sentence of the error that its absence would raise."""

    chips: tuple[str, ...]  # /dev/neuron0, ...
    instance: str  # EC2's name, or what the machine calls itself
    driver: str  # version, or nothing
    target: targets.Target | None
    libnrt: str  # where the runtime is, or nothing
    compiler: str  # the program, or nothing
    compiler_version: str
    plugin: str  # version of libneuronxla, or nothing
    jax: str
    problems: Mapping[str, str] = field(default_factory=dict)  # by what is missing

    @property
    def why_not(self) -> str:
        """Why nothing can run here, or nothing."""
        if not self.chips:
            return "there is no /dev/neuron0"
        return "" if self.libnrt or self.plugin else "neither libnrt nor jax's plugin is installed"


def find(root: Path = Path("/"), load: Import = import_module) -> Found:
    """Look, and raise nothing. `root` and `load` stand for the machine in tests."""
    problems: dict[str, str] = {}
    chips = tuple(
        str(p) for p in sorted((root / "dev").glob("neuron*")) if re.fullmatch(r"neuron\d+", p.name)
    )
    instance = _first_line(root / PRODUCT)
    library = libnrt_path()
    if not _loads(library):
        problems["libnrt"] = f"{library} cannot be loaded; install aws-neuronx-runtime-lib"
        library = ""
    plugin = _asked(problems, "libneuronxla", load)
    compiler = compiler_path() or ""
    version = _asked(problems, "neuronxcc", load, package="neuronx-cc")
    if not compiler:
        problems.setdefault("neuronx-cc", "there is no neuronx-cc on the PATH")
    return Found(
        chips=chips,
        instance=instance,
        driver=_first_line(root / DRIVER),
        target=targets.of_instance(instance),
        libnrt=library,
        compiler=compiler,
        compiler_version=version,
        plugin=plugin,
        jax=_metadata("jax"),
        problems=problems,
    )


def package_version(module: str, package: str = "", load: Import = import_module) -> str:
    """The version of one of AWS's packages. Raises StubPackage or PackageMissing."""
    package = package or module
    try:
        version = str(getattr(load(module), "__version__", "")) or _metadata(package)
    except ImportError as error:
        # A stub that installs no module of that name still has its metadata.
        if STUB in str(error) or _metadata(package):
            raise StubPackage(package) from None
        raise PackageMissing(package) from None
    major = re.match(r"\d+", version)
    if package == "neuronx-cc" and (major is None or int(major[0]) < OLDEST_COMPILER):
        raise StubPackage(package)
    return version


def require_device(found: Found) -> None:
    """Raises NoNeuronDevice where nothing can run."""
    if found.why_not:
        raise NoNeuronDevice(found.why_not)


def check_jax(version: str, wanted: str = JAX) -> None:
    """Raises JaxPinMismatch where AWS's plugin would meet a jax that it was not made for."""
    if version.split(".")[:2] != wanted.split(".")[:2]:
        raise JaxPinMismatch(version, wanted)


def libnrt_path() -> str:
    """Where the runtime's library is looked for."""
    return os.environ.get("OCTAVO_NEURON_LIBNRT", LIBNRT)


def compiler_path() -> str | None:
    """The compiler, or None."""
    return shutil.which(os.environ.get("OCTAVO_NEURON_COMPILER", "neuronx-cc"))


def _asked(problems: dict[str, str], module: str, load: Import, package: str = "") -> str:
    try:
        return package_version(module, package, load)
    except NeuronError as error:
        problems[package or module] = str(error)
    except Exception as error:  # a package that is broken in a way of its own
        problems[package or module] = f"{package or module} cannot be imported: {error}"
    return ""


def _metadata(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def _first_line(path: Path) -> str:
    try:
        return path.read_text().splitlines()[0].strip()
    except (OSError, IndexError, UnicodeDecodeError):
        return ""
