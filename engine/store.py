"""Compiled programs on disk, found again without tracing: what a warm start would spend most on.

jax's own cache is asked with a traced and lowered program; here a program is known by what it is
made from: Octavo's sources, jax, XLA's flags, the device, the model's config and every size. A
change of any of them is another name, and its files are compiled anew; what cannot be read is
compiled again. Files that nobody read for a month go when another is written.
"""

import hashlib
import logging
import os
import pickle
import platform
import tempfile
import time
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from jax.experimental import serialize_executable

import octavo

logger = logging.getLogger(__name__)

PARTS = ("backends", "engine", "models", "pallas_kernels")  # what a program is traced from
SETTINGS = (
    "jax_default_matmul_precision",
    "jax_default_prng_impl",
    "jax_enable_x64",
    "jax_numpy_dtype_promotion",
    "jax_threefry_partitionable",
)
UNREAD = 30 * 24 * 3600  # seconds


class Store:
    """A folder of programs that are all made from the same things."""

    def __init__(self, folder: Path, *made_from: object) -> None:
        """`made_from`: whatever decides the programs besides the process's own surroundings; each
        must have a complete repr."""
        self.folder = folder
        self._base = repr((_surroundings(), made_from))

    def _path(self, name: str, details: object) -> Path:
        digest = hashlib.sha256(repr((self._base, name, details)).encode()).hexdigest()
        return self.folder / f"{name.replace(' ', '-')}-{digest[:32]}"

    def has(self, name: str, details: object) -> bool:
        """Whether there is such a program."""
        return self._path(name, details).exists()

    def load(self, name: str, details: object) -> Any | None:
        """The program, ready to be called; None where it cannot be read."""
        path = self._path(name, details)
        try:
            program = serialize_executable.deserialize_and_load(*pickle.loads(path.read_bytes()))
            os.utime(path)
        except Exception as error:  # another driver, half a file: it is compiled again
            logger.debug("the compiled program %s cannot be used: %s", path, error)
            return None
        return program

    def save(self, name: str, details: object, program: Any) -> None:
        """Keep a program. What cannot be kept is only not found the next time."""
        path = self._path(name, details)
        try:
            blob = pickle.dumps(serialize_executable.serialize(program))
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self.folder, delete=False) as file:
                file.write(blob)
            os.replace(file.name, path)  # whole or not at all, whoever else writes
        except Exception as error:
            logger.debug("the compiled program %s cannot be kept: %s", path, error)

    def prune(self) -> None:
        """Delete what nobody read for a month."""
        oldest = time.time() - UNREAD
        for path in self.folder.glob("*"):
            try:
                if path.stat().st_mtime < oldest:
                    path.unlink()
            except OSError:  # another process was faster
                continue


@cache
def _sources() -> str:
    """One digest of the code that programs are traced from."""
    digest = hashlib.sha256()
    root = Path(octavo.__file__).parent
    for part in PARTS:
        for path in sorted((root / part).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _surroundings() -> tuple[object, ...]:
    """What decides a program besides its function and arguments."""
    device = jax.devices()[0]
    return (
        _sources(),
        jax.__version__,
        metadata.version("jaxlib"),
        device.platform,
        device.device_kind,
        device.client.platform_version,
        len(jax.devices()),
        _processor() if device.platform == "cpu" else "",
        [(name, str(jax.config.values.get(name))) for name in SETTINGS],
        [os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")],
    )


@cache
def _processor() -> str:
    """What compiled code for this processor may use."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor()
    kept = {line for line in lines if line.startswith(("model name", "flags", "Features"))}
    return repr(sorted(kept))
