"""A `tokenizers.Tokenizer` from GGUF metadata: byte-level BPE or SentencePiece BPE.

GGUF names the pre-tokenizer and leaves its rule to the reader; the rules here are those that the
models were trained with. SentencePiece keeps no merges: they follow from the scores, because it
always merges the pair whose union scores highest.
"""

from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from octavo.models.checkpoint import CheckpointError

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # of tokenizer.ggml.token_type
SPACE = "\u2581"  # SentencePiece writes a space as this

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# What a file made before pre-tokenizers had names gets.
_UNNAMED = (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")

# name in `tokenizer.ggml.pre` -> regular expressions, each splitting what the one before left whole
PRE_TOKENIZERS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais", "roberta-bpe", "gpt2"), (_GPT2,)),
    **dict.fromkeys(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "granite-docling"),
        (r"\p{N}", _GPT2),
    ),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "smaug-bpe", "dbrx"), (_LLAMA3,)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez"), (_QWEN2,)),
    "tekken": (_TEKKEN,),
    **dict.fromkeys(("gpt-4o", "llama4"), (_GPT4O,)),
    **dict.fromkeys(("default", ""), _UNNAMED),
}
WHOLE_TOKENS_FIRST = ("llama-bpe", "llama3", "llama-v3", "tekken")  # a known word skips the merges
COMPOSED = ("qwen2", "deepseek-r1-qwen")  # text is brought to Unicode form C first
NO_STRIP = ("<unk>", "<s>", "<|endoftext|>")  # of Phi-3's control tokens, which eat spaces behind


def build_tokenizer(metadata: Mapping[str, Any]) -> Tokenizer:
    """Raises CheckpointError if the metadata holds no tokenizer, or one of an unknown kind."""
    model = metadata.get("tokenizer.ggml.model")
    tokens = metadata.get("tokenizer.ggml.tokens")
    if model is None or tokens is None:
        raise CheckpointError(
            "the GGUF file holds no tokenizer: pass --tokenizer with a folder or repository"
        )
    if model == "gpt2":
        tokenizer = _byte_level(metadata, tokens)
    elif model == "llama":
        tokenizer = _sentencepiece(metadata, tokens)
    else:
        raise CheckpointError(
            f"the GGUF file has a tokenizer of kind `{model}`, known are gpt2 and llama: "
            "pass --tokenizer with a folder or repository"
        )
    _add_tokens(tokenizer, metadata, tokens)
    return tokenizer


def _byte_level(metadata: Mapping[str, Any], tokens: list[str]) -> Tokenizer:
    pre = str(metadata.get("tokenizer.ggml.pre", ""))
    if pre not in PRE_TOKENIZERS:
        raise CheckpointError(
            f"the GGUF file has the unknown pre-tokenizer `{pre}`: "
            "pass --tokenizer with a folder or repository"
        )
    merges = [_pair(merge) for merge in metadata.get("tokenizer.ggml.merges", ())]
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, ignore_merges=pre in WHOLE_TOKENS_FIRST)
    )
    if pre in COMPOSED:
        tokenizer.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(rule), "isolated") for rule in PRE_TOKENIZERS[pre]]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _pair(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    return left, right


def _sentencepiece(metadata: Mapping[str, Any], tokens: list[str]) -> Tokenizer:
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    vocab = {token: index for index, token in enumerate(tokens)}
    unknown = int(metadata.get("tokenizer.ggml.unknown_token_id", 0))
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=merges_from_scores(metadata, tokens),
            unk_token=tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    spaces = normalizers.Replace(" ", SPACE)
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces])
        steps.append(decoders.Strip(" ", 1, 0))
    else:
        tokenizer.normalizer = spaces
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def merges_from_scores(metadata: Mapping[str, Any], tokens: list[str]) -> list[tuple[str, str]]:
    """Every way to make a token of two others; higher scores of the union first."""
    scores = metadata["tokenizer.ggml.scores"].tolist()
    kinds = metadata["tokenizer.ggml.token_type"].tolist()
    rank = {
        token: (-score, index)
        for index, (token, score, kind) in enumerate(zip(tokens, scores, kinds, strict=True))
        if kind == NORMAL
    }
    merges = []
    for token in sorted(rank, key=rank.__getitem__):
        for cut in range(1, len(token)):
            left = token[:cut]
            if left in rank:
                right = token[cut:]
                if right in rank:
                    merges.append((left, right))
    return merges


def _add_tokens(tokenizer: Tokenizer, metadata: Mapping[str, Any], tokens: list[str]) -> None:
    """Control tokens, and those that are one token wherever their text appears."""
    kinds = metadata.get("tokenizer.ggml.token_type")
    if kinds is None:
        return
    eats_spaces = metadata.get("general.architecture") == "phi3"
    special, plain = [], []
    for token, kind in zip(tokens, kinds.tolist(), strict=False):
        if kind == CONTROL:
            strip = eats_spaces and token not in NO_STRIP
            special.append(AddedToken(token, special=True, normalized=False, rstrip=strip))
        elif kind == USER_DEFINED:
            plain.append(AddedToken(token, special=False, normalized=False))
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(plain)
