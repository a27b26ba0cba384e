"""`octavo doctor`: what this machine has, line by line. It reports what is broken, never breaks."""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module, metadata, util
from pathlib import Path
from typing import Any

import octavo
from octavo.cli.table import size

DESCRIPTION = """\
Check this machine: Python, packages, devices, memory, caches and built-in models.
Every line says ok or warn; a warning comes with what to do. It exits 0 unless nothing can run.

`octavo doctor neuron` compiles and runs small graphs on an AWS Inferentia or Trainium instance, and
says what is proven there, what failed and what could not be asked; it exits 0 when a model can be
served.

examples:
  octavo doctor
  octavo doctor neuron
"""

PACKAGES = ("jax", "jaxlib", "flax", "numpy", "transformers", "tokenizers", "gguf", "pyzmq")
DEVICE_SECONDS = 120  # an accelerator held by another process can hang its driver's start


@dataclass(frozen=True)
class Line:
    """One finding."""

    level: str  # ok | warn | fail
    what: str
    found: str
    hint: str = ""


def register(subparsers: Any) -> None:
    """Add the command to the command line."""
    parser = subparsers.add_parser("doctor", help="check this machine", description=DESCRIPTION)
    parser.add_argument(
        "hardware", nargs="?", choices=("neuron",), help="run the checks of this hardware instead"
    )


def run(args: argparse.Namespace) -> int:
    """Print every finding; 1 if one of them is a failure."""
    if args.hardware == "neuron":
        return int(import_module("octavo.cli.doctor_neuron").run())
    failed = False
    for check in CHECKS:
        for line in guarded(check):
            failed = failed or line.level == "fail"
            print(f"{line.level:<5} {line.what:<18} {line.found}")
            if line.hint:
                print(f"      hint: {line.hint}")
    return 1 if failed else 0


def guarded(check: Callable[[], Iterator[Line]]) -> Iterator[Line]:
    """The findings of a check; its own failure is one more finding."""
    try:
        yield from check()
    except Exception as error:
        name = check.__name__.removeprefix("check_")
        yield Line("warn", name, f"could not be checked: {type(error).__name__}: {error}")


def check_python() -> Iterator[Line]:
    """Python and Octavo."""
    version = ".".join(map(str, sys.version_info[:3]))
    good = sys.version_info >= (3, 11)
    yield Line(
        "ok" if good else "fail",
        "python",
        f"{version} ({sys.executable})",
        "" if good else "Octavo needs Python 3.11 or newer",
    )
    yield Line("ok", "octavo", octavo.__version__)


def check_packages() -> Iterator[Line]:
    """The versions of what Octavo stands on."""
    for name in PACKAGES:
        try:
            yield Line("ok", name, metadata.version(name))
        except metadata.PackageNotFoundError:
            yield Line("fail", name, "not installed", f"pip install {name}")
    jax, jaxlib = metadata.version("jax"), metadata.version("jaxlib")
    if jax.split(".")[:2] != jaxlib.split(".")[:2]:
        yield Line("warn", "jax and jaxlib", f"{jax} and {jaxlib}", f"pip install jaxlib=={jax}")
    if not (0, 10) <= tuple(int(part) for part in jax.split(".")[:2]) < (0, 13):
        yield Line("warn", "jax", f"{jax} is untested", "pip install 'jax>=0.10,<0.13'")


# Devices are asked in a child process: a driver that hangs or crashes takes only the child along.
_ASK_DEVICES = """
import json, jax
found = []
for device in jax.devices():
    stats = device.memory_stats() or {}
    found.append([str(device), stats.get("bytes_limit", 0)])
print("devices:" + json.dumps(found))
"""


def check_devices() -> Iterator[Line]:
    """What jax can compute on."""
    try:
        child = subprocess.run(
            [sys.executable, "-c", _ASK_DEVICES],
            capture_output=True,
            text=True,
            timeout=DEVICE_SECONDS,
        )
    except subprocess.TimeoutExpired:
        yield Line(
            "fail",
            "devices",
            f"jax found none in {DEVICE_SECONDS} s",
            "another process may hold the device: end it, or run with JAX_PLATFORMS=cpu",
        )
        return
    answer = [line for line in child.stdout.splitlines() if line.startswith("devices:")]
    if not answer:
        last = (child.stderr.strip().splitlines() or ["no output"])[-1]
        yield Line("fail", "devices", last, "JAX_PLATFORMS=cpu octavo doctor tries the CPU alone")
        return
    for name, limit in json.loads(answer[0].removeprefix("devices:")):
        yield Line("ok", "device", name + (f", {size(limit)}" if limit else ""))


def check_accelerators() -> Iterator[Line]:
    """Hardware that is there although the package for it may not be."""
    if shutil.which("nvidia-smi") and not util.find_spec("jax_plugins"):
        yield Line("warn", "NVIDIA GPU", "without jax's plugin", "pip install 'octavo[cuda]'")
    if Path("/dev/accel0").exists() and not util.find_spec("libtpu"):
        yield Line("warn", "TPU", "without libtpu", "pip install 'octavo[tpu]'")
    if Path("/dev/neuron0").exists():
        try:
            import_module("libneuronxla")
            yield Line("ok", "Neuron", "libneuronxla is importable")
        except ImportError as error:
            # The package of this name outside AWS's index is a stub that raises on import.
            yield Line(
                "warn",
                "Neuron",
                str(error),
                "docs/dependencies.md has the command",
            )


def check_memory() -> Iterator[Line]:
    """Memory of the host and processors of this process."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    yield Line("ok", "host memory", f"{size(total)}, {size(free)} unused")
    yield Line("ok", "processors", f"{len(os.sched_getaffinity(0))}")


def check_caches() -> Iterator[Line]:
    """Folders that make the second start quick."""
    home = Path.home() / ".cache"
    for what, folder in (
        ("compiled programs", home / "octavo"),
        ("hub downloads", home / "huggingface"),
    ):
        parent = next(p for p in (folder, *folder.parents) if p.exists())
        if not os.access(parent, os.W_OK):
            yield Line("warn", what, f"{folder} cannot be written", "make it writable")
        elif folder.exists():
            held = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
            yield Line("ok", what, f"{folder}, {size(held)}")
        else:
            yield Line("ok", what, f"{folder}, made at first use")


def check_models() -> Iterator[Line]:
    """The built-in models, with their checksums."""
    builtin = import_module("octavo.models.sources.builtin")
    for name in builtin.MODELS:
        try:
            yield Line("ok", name, f"{builtin.builtin_file(name)}, SHA-256 as expected")
        except ValueError as error:
            yield Line("warn", name, str(error))


CHECKS = (
    check_python,
    check_packages,
    check_devices,
    check_accelerators,
    check_memory,
    check_caches,
    check_models,
)
