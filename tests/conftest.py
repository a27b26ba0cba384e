"""What every test finds: the CPU as its device, and one folder of compiled programs."""

import os
import tempfile
from pathlib import Path

# Before anything imports jax. A test that needs another device sets JAX_PLATFORMS in the shell.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir()) / "octavo-test-programs")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
