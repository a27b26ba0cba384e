"""Starts the engine process and knows how it ended."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile

from octavo.engine.config import EngineConfig
from octavo.engine.link import last_words
from octavo.engine.process import CORE

MAX_SOCKET_PATH = 90  # bytes; the kernel allows 107 for the whole path of a socket


class EngineProcess:
    """The engine as a child: it ends when told to, and when this process ends."""

    def __init__(self, config: EngineConfig, core: str = CORE) -> None:
        """Start the child; `core` names what it builds, as module:class."""
        self.folder = _private_folder()
        self.address = f"ipc://{self.folder}"
        # A session of its own: Ctrl-C in a terminal reaches only us, and we let the engine finish.
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from octavo.engine.process import main; main()"],
            stdin=subprocess.PIPE,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        assert self._process.stdin is not None
        order = {"config": dataclasses.asdict(config), "address": self.address, "core": core}
        with contextlib.suppress(BrokenPipeError):  # it died at once: `ended` says so
            self._process.stdin.write(json.dumps(order).encode() + b"\n")
            self._process.stdin.flush()  # and stays open: its end tells the child that we are gone

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        return self._process.poll()

    def ended(self) -> str | None:
        """How it ended, in a sentence; None while it lives."""
        code = self._process.poll()
        if code is None:
            return None
        if words := last_words(self.address):
            return words
        if code < 0:
            name = signal.Signals(-code).name
            hint = "; the system may have run out of memory" if -code == signal.SIGKILL else ""
            return f"the engine process was ended by {name}{hint}"
        return f"the engine process ended with exit code {code}"

    def stop(self, timeout: float) -> int | None:
        """Ask it to finish, wait `timeout` seconds, then end it; returns its exit code."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(timeout)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)
        return self._process.returncode


def _private_folder() -> str:
    """A folder that only this user can enter, with a path short enough for a socket."""
    folder = tempfile.mkdtemp(prefix="octavo-")
    if len(folder) > MAX_SOCKET_PATH:
        os.rmdir(folder)
        folder = tempfile.mkdtemp(prefix="octavo-", dir="/tmp")
    return folder
