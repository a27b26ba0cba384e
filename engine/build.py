"""Compiles an engine's programs while its weights are still on their way."""

import logging
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any

import jax

from octavo.backends.record import Backend
from octavo.engine.assemble import Progress, cache_maker, limits_of
from octavo.engine.config import EngineConfig
from octavo.engine.memory import Resolved
from octavo.engine.programs import Programs
from octavo.engine.step import Machine

logger = logging.getLogger(__name__)


class Build:
    """A thread that begins when the sizes are known, and ends with compiled programs."""

    def __init__(
        self, config: EngineConfig, progress: Progress | None = None, params: Any = None
    ) -> None:
        """`params`: the weights, or their shapes; without them those that the model asks for."""
        self.seconds = 0.0
        self._config, self._progress, self._params = config, progress, params
        self._stop = Event()
        self._made: Future[Programs] = Future()

    def begin(self, backend: Backend, resolved: Resolved) -> None:
        """Start to compile."""
        # A daemon, so that it holds up no process whose weights could not be read.
        Thread(target=self._run, args=(backend, resolved), name="build", daemon=True).start()

    def _run(self, backend: Backend, resolved: Resolved) -> None:
        began = time.perf_counter()
        config, model = self._config, resolved.model
        try:
            machine = Machine(resolved.dims, model, backend, resolved.mesh)
            folder = cache_folder(config.compilation_cache)
            programs = Programs(machine, limits_of(config, resolved), config.max_logprobs, folder)
            params = self._params
            if params is None or backend.cores:  # of cores, those are what one of them has
                params = model.abstract_params(resolved.dtype)
            make = cache_maker(backend, resolved)
            programs.compile(params, make, self._progress, stop=self._stop)
            self.seconds = time.perf_counter() - began
            self._made.set_result(programs)
        except BaseException as error:  # raised again where the programs are asked for
            self._made.set_exception(error)

    def programs(self) -> Programs:
        """Wait for them."""
        return self._made.result()

    @contextmanager
    def stopped_by_errors(self) -> Iterator[None]:
        """What fails in here makes the programs pointless."""
        try:
            yield
        except BaseException:
            self._stop.set()
            raise


def cache_folder(folder: str) -> Path | None:
    """Where compiled programs are kept between runs; None where they are not."""
    if folder == "none":
        return None
    path = Path.home() / ".cache" / "octavo" / "programs"
    if chosen := jax.config.values["jax_compilation_cache_dir"]:  # of jax's own cache
        path = Path(chosen)
    path = path if folder == "auto" else Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        logger.warning(
            "compiled programs cannot be kept in %s (%s), so every start compiles again; "
            "--compilation-cache takes another folder",
            path,
            (error.strerror or str(error)).lower(),
        )
        return None
    return path


def use_cache(folder: str) -> Path | None:
    """Let jax keep what it compiles in `folder`: for what has no store of its own."""
    path = cache_folder(folder)
    if path is not None and not jax.config.values["jax_compilation_cache_dir"]:
        jax.config.update("jax_compilation_cache_dir", str(path))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return path
