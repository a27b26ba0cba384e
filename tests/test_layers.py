"""The house's own rules: who imports whom, who may ask for the hardware, how long is long."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# A folder imports itself and these; a folder below may be reached directly.
MAY_IMPORT = {
    "pallas_kernels": set(),
    "models": set(),
    "backends": {"pallas_kernels", "models"},
    "engine": {"backends", "models", "pallas_kernels"},
    "server": {"engine"},
}
FOLDERS = (*MAY_IMPORT, "bench", "octavo")

# What an API process or the command line imports, and so must never bring jax along.
JAX_FREE = (
    "engine/config.py",
    "engine/messages.py",
    "engine/sampling_params.py",
    "engine/text",
    "engine/grammar",
    "server",
)

FILE_LINES, KERNEL_FILE_LINES = 400, 600
FUNCTION_LINES, KERNEL_FUNCTION_LINES = 60, 150


def modules(*places: str) -> list[Path]:
    """The Python files of folders or single files, without the links in octavo/."""
    found: list[Path] = []
    for place in places:
        path = ROOT / place
        if path.is_file():
            found.append(path)
        elif place == "octavo":
            found += [*path.glob("*.py"), *(path / "cli").glob("*.py")]
        else:
            found += path.rglob("*.py")
    return sorted(found)


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imports(path: Path) -> Iterator[str]:
    """Every module that a file names in an import, at the top or in a function."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write the full name, octavo.x.y"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_imports_go_one_way(folder: str) -> None:
    allowed = {folder} | MAY_IMPORT[folder]
    wrong = [
        f"{name(path)} imports {target}"
        for path in modules(folder)
        for target in imports(path)
        if target.startswith("octavo.")
        and target.split(".")[1] in FOLDERS + ("cli",)
        and target.split(".")[1] not in allowed
    ]
    assert wrong == []


def test_nobody_reaches_into_the_private_parts_of_jax() -> None:
    wrong = [
        f"{name(path)} imports {target}"
        for path in modules(*FOLDERS)
        for target in imports(path)
        if target.startswith(("jax._src", "jaxlib"))
    ]
    assert wrong == []


def test_only_backends_ask_which_hardware_this_is() -> None:
    wrong = []
    for path in modules("pallas_kernels", "models", "engine", "server", "octavo"):
        for node in ast.walk(tree(path)):
            if not isinstance(node, ast.Attribute):
                continue
            of_sys = isinstance(node.value, ast.Name) and node.value.id == "sys"
            if node.attr in ("default_backend", "device_kind") or (
                node.attr == "platform" and not of_sys
            ):
                wrong.append(f"{name(path)}:{node.lineno} asks for {node.attr}")
    assert wrong == []


def test_what_an_api_process_imports_brings_no_jax() -> None:
    places = [name(path).removeprefix("octavo/") for path in modules(*JAX_FREE)]
    places = [place.removesuffix(".py").removesuffix("__init__").strip("/") for place in places]
    names = sorted(f"octavo.{place.replace('/', '.')}".strip(".") for place in places)
    program = (
        "import importlib, sys\n"
        f"for name in {names!r}:\n"
        "    importlib.import_module(name)\n"
        "    found = [m for m in ('jax', 'jaxlib', 'flax') if m in sys.modules]\n"
        "    assert not found, f'{name} brings {found}'\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_files_are_short() -> None:
    long = {}
    for path in modules(*FOLDERS, "tests"):
        limit = KERNEL_FILE_LINES if "pallas_kernels" in path.parts else FILE_LINES
        if (count := len(path.read_text().splitlines())) > limit:
            long[name(path)] = count
    assert long == {}


def test_functions_are_short() -> None:
    long = {}
    for path in modules(*FOLDERS, "tests"):
        limit = KERNEL_FUNCTION_LINES if "pallas_kernels" in path.parts else FUNCTION_LINES
        for node in ast.walk(tree(path)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                count = (node.end_lineno or node.lineno) - node.lineno + 1
                if count > limit:
                    long[f"{name(path)}:{node.name}"] = count
    assert long == {}


def test_every_folder_with_modules_is_a_package() -> None:
    missing = {
        name(path.parent)
        for path in modules(*FOLDERS)
        if not (path.parent / "__init__.py").exists()
    }
    assert missing == set()
