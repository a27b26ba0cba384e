"""Text to token ids and back, for every kind of checkpoint. Never imports jax.

A Hugging Face folder with a tokenizer.json is read by the `tokenizers` package alone; transformers
(and what it drags in) is imported only where a folder has nothing but a SentencePiece model.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from octavo.engine.text.gguf_tokenizer import build_tokenizer
from octavo.engine.text.pieces import Pieces
from octavo.models.checkpoint import Checkpoint, CheckpointError, TokenizerFiles, locate
from octavo.models.sources.folder import read_json, read_optional_json
from octavo.models.sources.gguf_file import read_gguf

# Tokenizer classes of transformers that put their own rule over what tokenizer.json says.
BOS_BY_CONFIG = ("Llama", "CodeLlama", "Gemma")


class Tokenizer:
    """One model's tokenizer. Read-only once made; safe to share between threads."""

    def __init__(
        self,
        backend: Backend,
        *,
        special_tokens: Mapping[str, str],
        chat_templates: Mapping[str, str] | None = None,
        add_bos: bool | None = None,
        add_eos: bool = False,
    ) -> None:
        self.backend = backend
        self.special_tokens = dict(special_tokens)  # "bos_token" -> text: what a template may use
        self.chat_templates = dict(chat_templates or {})  # "default" and other names
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self.bos_id = self._id_of("bos_token")
        self.eos_id = self._id_of("eos_token")
        self.pad_id = self._id_of("pad_token")
        self.pieces = Pieces.of(backend)
        # None leaves it to the backend's own post-processor, which True and False switch off.
        self._add_bos = add_bos
        self._add_eos = add_eos

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`. A rendered chat template brings its own special tokens."""
        ends = add_special_tokens and self._add_bos is None
        ids: list[int] = self.backend.encode(text, add_special_tokens=ends).ids
        return self._with_ends(ids) if add_special_tokens else ids

    def encode_batch(
        self, texts: Sequence[str], add_special_tokens: bool = True
    ) -> list[list[int]]:
        """As `encode` for each text, on all cores."""
        ends = add_special_tokens and self._add_bos is None
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=ends)
        ids = [encoding.ids for encoding in encodings]
        return [self._with_ends(row) for row in ids] if add_special_tokens else ids

    def encode_within(
        self, text: str, pair: str | None = None, limit: int | None = None
    ) -> tuple[list[int], int]:
        """Token ids of a text or of a pair, and where the second text's tokens begin (0: nowhere).

        At most `limit` tokens: the ends of the texts are cut, of the longer one first, and the
        special tokens stay. Raises ValueError where the special tokens alone are more.
        """
        ends = self._add_bos is None
        first = self.backend.encode(text, add_special_tokens=False)
        second = None if pair is None else self.backend.encode(pair, add_special_tokens=False)
        if limit is not None:
            special = bool(self._add_bos) + bool(self._add_eos)
            if ends:
                special = self.backend.num_special_tokens_to_add(second is not None)
            room = limit - special
            if room < 1:
                raise ValueError(f"must be at least {special + 1} here, got {limit}")
            longer, shorter = len(first), 0 if second is None else len(second)
            if second is not None and longer + shorter > room:
                # What the shorter one leaves, but at least half.
                first_room = max(room - len(second), (room + 1) // 2)
                first.truncate(min(len(first), first_room))
                second.truncate(room - len(first))
            elif longer > room:
                first.truncate(room)
        whole = self.backend.post_process(first, second, ends)
        ids = self._with_ends(whole.ids)
        at = whole.type_ids.index(1) if 1 in whole.type_ids else 0
        return ids, at and at + (len(ids) > len(whole.ids) and ids[1:2] == whole.ids[:1])

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`; what is no valid UTF-8 becomes U+FFFD."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def id_to_token(self, token: int) -> str | None:
        """The vocabulary's own spelling of one token."""
        return self.backend.id_to_token(token)

    def token_to_id(self, token: str) -> int | None:
        """The reverse of `id_to_token`."""
        return self.backend.token_to_id(token)

    def token_text(self, token: int) -> str:
        """What one token adds to a text, alone: for lists of log probabilities."""
        if self.pieces is not None:
            return self.pieces.text(token)
        return self.backend.decode([token], skip_special_tokens=False)

    def token_bytes(self, token: int) -> bytes:
        """The bytes that one token adds to a text."""
        if self.pieces is not None:
            return self.pieces.raw(token)
        return self.token_text(token).encode()

    def _id_of(self, name: str) -> int | None:
        text = self.special_tokens.get(name)
        return None if text is None else self.backend.token_to_id(text)

    def _with_ends(self, ids: list[int]) -> list[int]:
        """A beginning and an end where the model wants them and the text did not bring them."""
        if self._add_bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            ids = [self.bos_id, *ids]
        if self._add_eos and self.eos_id is not None and ids[-1:] != [self.eos_id]:
            ids = [*ids, self.eos_id]
        return ids


def load_tokenizer(
    source: Checkpoint | str | Path,
    *,
    revision: str = "",
    offline: bool = False,
    token: str | None = None,
) -> Tokenizer:
    """The tokenizer of an opened checkpoint, or of a folder, .gguf file, repository or built-in."""
    if isinstance(source, Checkpoint):
        files = source.tokenizer
        if files.folder is None and files.gguf is None:
            raise CheckpointError(
                f"`{source.path}` holds no tokenizer: pass --tokenizer with a folder or repository"
            )
    else:
        path = locate(source, revision=revision, offline=offline, load_format="dummy", token=token)
        if path.suffix == ".gguf":
            files = TokenizerFiles(gguf=read_gguf(path).metadata)
        elif (path / "tokenizer.gguf").exists():
            files = TokenizerFiles(gguf=read_gguf(path / "tokenizer.gguf").metadata)
        else:
            files = TokenizerFiles(folder=path if path.is_dir() else path.parent)
    if files.gguf is not None:
        return _from_gguf(files.gguf)
    assert files.folder is not None, f"{files=}"
    return _from_folder(files.folder)


def _from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    backend = build_tokenizer(metadata)
    tokens = metadata["tokenizer.ggml.tokens"]
    special = {}
    for key, name in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        index = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if index is not None and int(index) < len(tokens):
            special[f"{name}_token"] = tokens[int(index)]
    templates = {}
    for name in metadata.get("tokenizer.chat_templates", ()):
        templates[name] = metadata.get(f"tokenizer.chat_template.{name}", "")
    if template := metadata.get("tokenizer.chat_template"):
        templates["default"] = template
    sentencepiece = metadata.get("tokenizer.ggml.model") == "llama"
    llama3 = metadata.get("tokenizer.ggml.pre") in ("llama-bpe", "llama3", "llama-v3", "tekken")
    return Tokenizer(
        backend,
        special_tokens=special,
        chat_templates=templates,
        add_bos=bool(metadata.get("tokenizer.ggml.add_bos_token", sentencepiece or llama3)),
        add_eos=bool(metadata.get("tokenizer.ggml.add_eos_token", False)),
    )


def _from_folder(folder: Path) -> Tokenizer:
    config = read_optional_json(folder / "tokenizer_config.json")
    special = _special_tokens(read_optional_json(folder / "special_tokens_map.json"))
    special |= _special_tokens(config)
    by_config = str(config.get("tokenizer_class", "")).startswith(BOS_BY_CONFIG)
    return Tokenizer(
        _backend(folder),
        special_tokens=special,
        chat_templates=_folder_templates(folder, config),
        add_bos=config.get("add_bos_token") if by_config else None,
        add_eos=bool(config.get("add_eos_token")) if by_config else False,
    )


def _backend(folder: Path) -> Backend:
    file = folder / "tokenizer.json"
    if file.exists():
        read_json(file)  # says where a file is cut off; the package only says that it is
        try:
            backend = Backend.from_file(str(file))
        except Exception as error:  # the package raises bare Exception
            raise CheckpointError(f"`{file}` cannot be read ({error}): download it again") from None
        backend.no_padding()
        backend.no_truncation()
        return backend
    if not any((folder / name).exists() for name in ("tokenizer.model", "vocab.json")):
        raise CheckpointError(
            f"`{folder}` holds no tokenizer: pass --tokenizer with a folder or repository"
        )
    from transformers import AutoTokenizer  # slow to import, so only where nothing else will do

    try:
        slow = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
        return slow.backend_tokenizer
    except Exception as error:
        raise CheckpointError(
            f"the tokenizer in `{folder}` cannot be read ({error}): "
            "pass --tokenizer with a folder or repository that has a tokenizer.json"
        ) from None


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """bos_token and its like, which are texts or objects with a `content`."""
    found = {}
    for name, value in config.items():
        if name.endswith("_token") and not name.startswith("add_"):
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str):
                found[name] = text
    return found


def _folder_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Chat templates by name, from each of the places where transformers has kept them."""
    templates: dict[str, str] = {}
    found = config.get("chat_template")
    if isinstance(found, str):
        templates["default"] = found
    elif isinstance(found, list):
        templates |= {entry["name"]: entry["template"] for entry in found}
    for name in ("chat_template.json", "processor_config.json"):
        alone = read_optional_json(folder / name).get("chat_template")
        if isinstance(alone, str):
            templates["default"] = alone
    for file in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        templates[file.stem] = file.read_text(encoding="utf-8")
    if (file := folder / "chat_template.jinja").exists():
        templates["default"] = file.read_text(encoding="utf-8")
    return templates
