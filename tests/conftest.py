"""What every test finds: the CPU as its device, and one folder of compiled programs."""

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before anything imports jax. A test that needs another device sets JAX_PLATFORMS in the shell.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir()) / "octavo-test-programs")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")


@pytest.fixture(scope="module", autouse=True)
def forget_programs() -> Iterator[None]:
    """What jax compiled for one file of tests is of no use to the next, and takes gigabytes."""
    yield
    jax = sys.modules.get("jax")
    if jax is not None:
        jax.clear_caches()


@pytest.fixture
def without_the_cache_of_jax() -> Iterator[None]:
    """What jax's own cache gives is not kept by ours; which tests ran before must not matter."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    before = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # it asks the setting once
    yield
    jax.config.update("jax_enable_compilation_cache", before)
    compilation_cache.reset_cache()
