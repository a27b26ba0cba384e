"""Fail if the wheel misses a module or a file of the page, or carries a stray one."""

import sys
import zipfile
from pathlib import Path

FOLDERS = ("pallas_kernels", "engine", "backends", "models", "server", "bench")


def main(wheel: str) -> None:
    """Compare the modules in the wheel with those in the repository."""
    want = {f"octavo/{p}" for f in FOLDERS for p in Path(f).rglob("*.py")}
    want |= {str(p) for p in Path("octavo").glob("*.py")}
    want |= {str(p) for p in Path("octavo/cli").glob("*.py")}
    want |= {f"octavo/{p}" for p in Path("server/page").iterdir()}
    have = {
        name
        for name in zipfile.ZipFile(wheel).namelist()
        if name.endswith(".py") or name.startswith("octavo/server/page/")
    }
    missing, stray = sorted(want - have), sorted(have - want)
    if missing or stray:
        sys.exit(f"error: the wheel is wrong\n  missing: {missing}\n  stray:   {stray}")
    print(f"{wheel}: {len(have)} modules and files of the page, as in the folders")


if __name__ == "__main__":
    main(sys.argv[1])
