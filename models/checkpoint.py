"""Open a checkpoint by whatever name the user has for it. Never imports jax.

smollm2-135m                 built in: comes as a package
path/to/folder               Hugging Face safetensors, or one .gguf, or saved by Octavo
path/to/model.gguf           one file, or the first of its numbered parts
path/to/config.json          with load_format="dummy": sizes only
organization/model           the Hugging Face hub; organization/model/file.gguf or
                             organization/model:Q4_K_M for one of its GGUF files
"""

import re
from pathlib import Path

from octavo.models.sources import builtin, hub
from octavo.models.sources.base import Checkpoint, CheckpointError, TokenizerFiles
from octavo.models.sources.dummy import open_dummy
from octavo.models.sources.gguf import open_gguf
from octavo.models.sources.orbax import MARKER, open_orbax
from octavo.models.sources.safetensors import open_safetensors, weight_files

__all__ = ["Checkpoint", "CheckpointError", "TokenizerFiles", "locate", "open_checkpoint"]

FORMATS = ("auto", "safetensors", "gguf", "orbax", "dummy")
_REPOSITORY = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+?)(?:/(?P<file>.+\.gguf)|:(?P<quant>[\w.-]+))?$")


def open_checkpoint(
    name: str | Path,
    *,
    revision: str = "",
    offline: bool = False,
    load_format: str = "auto",
    token: str | None = None,
) -> Checkpoint:
    """Find, download if needed, and open. Raises CheckpointError: a sentence and the next step."""
    if load_format not in FORMATS:
        raise CheckpointError(f"unknown load format `{load_format}`: one of {', '.join(FORMATS)}")
    path = locate(name, revision=revision, offline=offline, load_format=load_format, token=token)
    if load_format == "dummy":
        return open_dummy(path) if path.suffix != ".gguf" else open_gguf(path)
    found = format_of(path)
    if load_format not in ("auto", found):
        raise CheckpointError(
            f"`{path}` holds {found} and not {load_format}: drop --load-format {load_format}"
        )
    openers = {"safetensors": open_safetensors, "gguf": open_gguf, "orbax": open_orbax}
    return openers[found](path if found != "gguf" else gguf_in(path))


def locate(
    name: str | Path,
    *,
    revision: str = "",
    offline: bool = False,
    load_format: str = "auto",
    token: str | None = None,
) -> Path:
    """The folder or file on this machine that `name` means."""
    text = str(name)
    if text in builtin.MODELS:
        file = builtin.builtin_file(text)
        return file if file.suffix == ".gguf" else file.parent
    path = Path(text).expanduser()
    if path.exists():
        return path
    match = _REPOSITORY.match(text)
    if match is None or text.startswith((".", "/", "~")):
        names = ", ".join(builtin.MODELS)
        raise CheckpointError(
            f"`{text}` is not there: give a folder, a .gguf file, a repository as in "
            f"organization/model, or a built-in name ({names})"
        )
    return hub.download(
        match["repo"],
        revision=revision,
        offline=offline,
        token=token,
        weights=load_format != "dummy",
        gguf=match["file"] or match["quant"] or ("*.gguf" if load_format == "gguf" else ""),
    )


def format_of(path: Path) -> str:
    """What a file or folder on disk holds. Raises CheckpointError if nothing that can be loaded."""
    if path.is_file():
        if path.suffix == ".gguf":
            return "gguf"
        if path.name.endswith(".json"):
            raise CheckpointError(
                f"`{path}` holds no weights: --load-format dummy makes random ones"
            )
        raise CheckpointError(f"`{path}` is not a .gguf file: give the folder that it lies in")
    if (path / MARKER).exists():
        return "orbax"
    if weight_files(path):
        return "safetensors"
    if list(path.glob("*.gguf")):
        return "gguf"
    for pattern in ("*.bin", "*.pt", "*.pth"):
        if pickles := sorted(path.glob(pattern)):
            raise CheckpointError(
                f"`{path}` has only pickled weights (`{pickles[0].name}`), which can run code "
                "when read: convert them to safetensors"
            )
    if (path / "config.json").exists():
        raise CheckpointError(
            f"`{path}` has a config.json and no weights: --load-format dummy makes random ones"
        )
    raise CheckpointError(f"`{path}` holds no model: neither config.json nor a .gguf file")


def gguf_in(path: Path) -> Path:
    """The .gguf file itself, or the only one (or first part) of a folder."""
    return path if path.is_file() else hub.choose_gguf(path, str(path))
