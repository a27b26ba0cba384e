"""Counts compilations, so that "no compile after ready" is a figure and not a hope."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import jax.monitoring

_EVENT = "/jax/core/compile/backend_compile_duration"


class CompileWatch:
    """Process-wide: compiles outside of `building` are those that a request had to wait for."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._building = 0
        self._listening = False
        self.unexpected = 0

    def listen(self) -> None:
        """Begin to count; once per process."""
        with self._lock:
            if not self._listening:
                jax.monitoring.register_event_duration_secs_listener(self._on_event)
                self._listening = True

    def _on_event(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event == _EVENT and not self._building:
            with self._lock:
                self.unexpected += 1

    @contextmanager
    def building(self) -> Iterator[None]:
        """An engine is starting somewhere in this process: its compiles are expected."""
        self.listen()
        with self._lock:
            self._building += 1
        try:
            yield
        finally:
            with self._lock:
                self._building -= 1


WATCH = CompileWatch()
