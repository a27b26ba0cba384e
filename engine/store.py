"""Compiled programs on disk, found again without tracing: what a warm start would spend most on.

jax's own cache wants the traced and lowered program; here a program is known by what it is made
from: Octavo's sources, jax, XLA's flags, the device, the model's config and every size. A change of
any of them is another name, and its files are compiled anew; what cannot be read is compiled again.
Files that nobody read for a month go when another is written.
"""

import hashlib
import logging
import os
import pickle
import tempfile
import threading
import time
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.monitoring
from jax.experimental import serialize_executable

import octavo
from octavo.backends.identity import identity

logger = logging.getLogger(__name__)

PARTS = ("backends", "engine", "models", "pallas_kernels")  # what a program is traced from
HIT = "/jax/compilation_cache/cache_hits"
UNREAD = 30 * 24 * 3600  # seconds


class _Hits(threading.local):
    """Whether jax's own cache, where the user has one, gave this thread a program."""

    def __init__(self) -> None:
        self.any = False

    def take(self) -> bool:
        """Whether it did since the last call."""
        found, self.any = self.any, False
        return found

    def on_event(self, event: str, **_: str | int) -> None:
        self.any = self.any or event == HIT


_HITS = _Hits()
jax.monitoring.register_event_listener(_HITS.on_event)


class Store:
    """A folder of programs that are all made from the same things."""

    def __init__(
        self, folder: Path, *made_from: object, devices: tuple[jax.Device, ...] = ()
    ) -> None:
        """`made_from`: whatever decides the programs besides the process's own surroundings; each
        must have a complete repr. `devices`: what they run on, all of this process without."""
        self.folder = folder
        self._devices = devices or None
        self._base = repr((sources(), identity(devices), made_from))

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
            blob, ins, out = pickle.loads(path.read_bytes())
            program = serialize_executable.deserialize_and_load(
                blob, ins, out, execution_devices=self._devices
            )
            os.utime(path)
        except Exception as error:  # another driver, half a file: it is compiled again
            logger.debug("the compiled program %s cannot be used: %s", path, error)
            return None
        return program

    def save(self, name: str, details: object, program: Any) -> None:
        """Keep a program. What cannot be kept is only not found the next time.

        One that came out of jax's own cache is not whole: it runs, but cannot be kept again.
        """
        if _HITS.take():
            return
        path = self._path(name, details)
        try:
            blob = pickle.dumps(serialize_executable.serialize(program))
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self.folder, delete=False) as file:
                file.write(blob)
            os.replace(file.name, path)  # whole or not at all, whoever else writes
        except Exception as error:
            logger.debug("the compiled program %s cannot be kept: %s", path, error)

    def subfolder(self, name: str) -> Path:
        """A folder in this one, made where that is possible, for others to keep things in."""
        path = self.folder / name
        with suppress(OSError):
            path.mkdir(parents=True, exist_ok=True)
        return path

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
def sources() -> str:
    """One digest of the code that programs are traced from."""
    digest = hashlib.sha256()
    root = Path(octavo.__file__).parent
    for part in PARTS:
        for path in sorted((root / part).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()
