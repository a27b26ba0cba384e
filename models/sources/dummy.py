"""A model without weights: config.json alone, for measurements and dry runs."""

from pathlib import Path

from octavo.models.sources.base import Checkpoint, CheckpointError, NoTensors, TokenizerFiles
from octavo.models.sources.folder import has_tokenizer, read_json, read_optional_json


def open_dummy(path: Path) -> Checkpoint:
    """From a folder with a config.json, or from the path of one."""
    folder = path if path.is_dir() else path.parent
    config_file = folder / "config.json" if path.is_dir() else path
    if not config_file.exists():
        raise CheckpointError(f"`{config_file}` is missing: dummy weights need a config.json")
    return Checkpoint(
        path=folder,
        format="dummy",
        config=read_json(config_file),
        tensors=NoTensors("dummy weights are made at random, not read"),
        tokenizer=TokenizerFiles(folder=folder if has_tokenizer(folder) else None),
        generation_config=read_optional_json(folder / "generation_config.json"),
    )
