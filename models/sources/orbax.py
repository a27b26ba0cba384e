"""Orbax folders: parameters saved once in their final layout, so that loading is reading.

    octavo.json            what this folder is
    config.json, generation_config.json, tokenizer files (or tokenizer.gguf)
    params/                the pytree, as orbax writes it

`open_orbax` reads the JSON without jax; `save` and `load` need jax and import it themselves.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from octavo.models.sources.base import Checkpoint, CheckpointError, NoTensors, TokenizerFiles
from octavo.models.sources.folder import TOKENIZER_FILES, read_json, read_optional_json
from octavo.models.sources.gguf import write_metadata
from octavo.models.sources.gguf_file import read_gguf
from octavo.models.sources.sentence import sentence_files

MARKER = "octavo.json"
VERSION = 1


def open_orbax(folder: Path) -> Checkpoint:
    """A folder that `save` wrote. Its weights come from `load`, not by name."""
    marker = read_json(folder / MARKER)
    if marker.get("version") != VERSION:
        raise CheckpointError(
            f"`{folder}` was saved in version {marker.get('version')} and this is version "
            f"{VERSION}: save it again from the original checkpoint"
        )
    if not (folder / "params").is_dir():
        raise CheckpointError(f"`{folder}` has no params: save it again")
    metadata = folder / "tokenizer.gguf"
    tokenizer = (
        TokenizerFiles(gguf=read_gguf(metadata).metadata)
        if metadata.exists()
        else TokenizerFiles(folder=folder)
    )
    return Checkpoint(
        path=folder,
        format="orbax",
        config=read_json(folder / "config.json"),
        tensors=NoTensors("the weights of this folder are loaded whole, in their final layout"),
        tokenizer=tokenizer,
        generation_config=read_optional_json(folder / "generation_config.json"),
    )


def save(params: Any, checkpoint: Checkpoint, folder: str | Path) -> Path:
    """Write `params` and what else of `checkpoint` a later start needs. The folder must be new."""
    import orbax.checkpoint as ocp  # type: ignore[import-untyped]

    folder = Path(folder).expanduser().resolve()
    if folder.exists() and any(folder.iterdir()):
        raise CheckpointError(f"`{folder}` is not empty: save to a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "params", params)
    _write_json(folder / "config.json", checkpoint.config)
    if checkpoint.generation_config:
        _write_json(folder / "generation_config.json", checkpoint.generation_config)
    if checkpoint.path.is_dir():
        for name in sentence_files(checkpoint.path):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(checkpoint.path / name, folder / name)
    if checkpoint.tokenizer.folder is not None:
        for name in TOKENIZER_FILES:
            if (source := checkpoint.tokenizer.folder / name).exists():
                shutil.copyfile(source, folder / name)
    elif checkpoint.format == "gguf":
        write_metadata(checkpoint.path, folder / "tokenizer.gguf")
    elif (source := checkpoint.path / "tokenizer.gguf").exists():
        shutil.copyfile(source, folder / "tokenizer.gguf")
    _write_json(folder / MARKER, {"version": VERSION, "saved_from": checkpoint.format})
    return folder


def load(folder: str | Path, abstract_params: Any) -> Any:
    """The pytree like `abstract_params` (ShapeDtypeStruct leaves, with shardings if any)."""
    import orbax.checkpoint as ocp

    path = Path(folder).expanduser().resolve() / "params"
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(path, abstract_params)
    except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else "it is damaged"
        raise CheckpointError(
            f"`{folder}` does not hold these parameters ({first[:200]}): "
            "save it again from the original checkpoint"
        ) from error


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, default=str) + "\n", encoding="utf-8")
