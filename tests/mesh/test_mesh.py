"""Runs the tests on eight devices: this process has one device, and jax cannot change its mind."""

import os
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
TESTS = [str(FOLDER / f"{name}on_eight_devices.py") for name in ("", "lanes_", "stacked_")]


def test_eight_devices_do_as_one() -> None:
    given = {**os.environ, "JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS]
    ran = subprocess.run(command, env=given, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-2000:]
