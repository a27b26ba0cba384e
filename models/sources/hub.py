"""Repositories of the Hugging Face hub: files are downloaded, code never is."""

from pathlib import Path

from octavo.models.sources.base import CheckpointError

TEXT = ["*.json", "*.jinja", "*.txt", "tokenizer.model"]
WEIGHTS = ["*.safetensors"]
IGNORED = ["original/*", "metal/*", "onnx/*", "consolidated*.safetensors", "*.msgpack"]


def download(
    repository: str,
    *,
    revision: str = "",
    offline: bool = False,
    token: str | None = None,
    weights: bool = True,
    gguf: str = "",
) -> Path:
    """A local folder with the repository's files, or the path of its .gguf file.

    `gguf` is a file name in the repository, or a quantization as in `Q4_K_M`; where it is empty and
    there are no safetensors, a repository's only .gguf is taken. Raises CheckpointError.
    """
    if gguf:
        pattern = gguf if gguf.endswith(".gguf") else f"*{gguf}*.gguf"
        folder = _snapshot(repository, [pattern], revision, offline, token)
        return choose_gguf(folder, repository, pattern if "/" in pattern else f"**/{pattern}")
    patterns = TEXT + (WEIGHTS if weights else [])
    folder = _snapshot(repository, patterns, revision, offline, token)
    if not weights or any(folder.glob("*.safetensors")):
        return folder
    names = _gguf_names(repository, revision, offline, token, folder)
    if len(names) == 1:
        folder = _snapshot(repository, names, revision, offline, token)
        return folder / names[0]
    if names:
        raise CheckpointError(
            f"`{repository}` has {len(names)} GGUF files: name one, as in {repository}/{names[0]}"
        )
    raise CheckpointError(
        f"`{repository}` has neither safetensors nor GGUF weights: "
        "choose a repository that has one of them"
    )


def choose_gguf(folder: Path, named: str, pattern: str = "*.gguf") -> Path:
    """The one .gguf, or the first part of the one split .gguf, that the pattern means."""
    found = sorted(folder.glob(pattern))
    whole = [file for file in found if "-of-" not in file.name or "-00001-of-" in file.name]
    if not whole:
        raise CheckpointError(f"`{named}` has no file like `{pattern}`: check its file list")
    if len(whole) > 1:
        names = ", ".join(file.name for file in whole[:8])
        raise CheckpointError(f"`{named}` has {len(whole)} GGUF files: name one of {names}")
    return whole[0]


def _gguf_names(
    repository: str, revision: str, offline: bool, token: str | None, folder: Path
) -> list[str]:
    if offline:
        return [str(file.relative_to(folder)) for file in sorted(folder.rglob("*.gguf"))]
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        files = HfApi(token=token).list_repo_files(repository, revision=revision or None)
    except (HfHubHTTPError, OSError):
        files = []
    return [name for name in files if name.endswith(".gguf") and "mmproj" not in name]


def _snapshot(
    repository: str, patterns: list[str], revision: str, offline: bool, token: str | None
) -> Path:
    from huggingface_hub import errors, snapshot_download

    at = f" at revision `{revision}`" if revision else ""
    try:
        folder = snapshot_download(
            repository,
            revision=revision or None,
            allow_patterns=patterns,
            ignore_patterns=IGNORED,
            local_files_only=offline,
            token=token,
        )
    except errors.GatedRepoError:
        problem = "asks for consent: accept its terms on its page, then set HF_TOKEN"
    except errors.RepositoryNotFoundError:
        problem = "is not on the hub: check the name; if it is private, set HF_TOKEN"
    except errors.RevisionNotFoundError:
        problem = "has no such revision: check --revision"
    except errors.HFValidationError:
        problem = "is not a repository name: it looks like organization/model"
    except errors.LocalEntryNotFoundError:
        problem = (
            "is not on disk: drop --offline to download it"
            if offline
            else "is not on disk and the hub cannot be reached: check the network, "
            "or give a local folder"
        )
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "an error")
        problem = f"cannot be downloaded, the hub answered {status}: try again, or set HF_TOKEN"
    except OSError as error:
        problem = f"cannot be downloaded ({error}): check the network and the disk"
    else:
        return Path(folder)
    raise CheckpointError(f"`{repository}`{at} {problem}") from None
