"""Tokens are those that the model was trained on."""

import json

import numpy as np
import pytest

from octavo.engine.text.generation import eos_token_ids
from octavo.engine.text.gguf_tokenizer import PRE_TOKENIZERS, build_tokenizer
from octavo.engine.text.template import load_template
from octavo.engine.text.tokenizer import load_tokenizer
from octavo.models.checkpoint import CheckpointError, open_checkpoint

PROMPT = "The capital of France is"
MIXED = (
    "def f(x):\n\treturn  x**2   # 12345.67\r\n\n\n",
    "naïve café 你好，世界！ 🦙👩‍👩‍👧 ½ Ⅻ",
    " leading,   inner   and trailing  ",
    "it's we'll I'M don't",
    "",
    " ",
    "\n",
)


def test_smollm2_prompts_give_the_golden_tokens(smollm2):
    assert smollm2.encode(PROMPT) == [504, 3575, 282, 4649, 314]
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    text = load_template(smollm2).render(chat)
    assert len(smollm2.encode(text, add_special_tokens=False)) == 37


def test_gemma3_prompts_give_the_golden_tokens(gemma3):
    assert gemma3.encode(PROMPT) == [2, 818, 5279, 529, 7001, 563]
    assert gemma3.encode(PROMPT, add_special_tokens=False) == [818, 5279, 529, 7001, 563]


@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
@pytest.mark.parametrize("text", MIXED)
def test_text_survives_the_round_trip(name, text, request):
    tokenizer = request.getfixturevalue(name)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert (
        b"".join(tokenizer.token_bytes(i) for i in tokenizer.encode(text, add_special_tokens=False))
        == text.encode()
    )


def test_special_tokens_are_one_token_and_can_be_skipped(smollm2):
    ids = smollm2.encode("<|im_start|>user\nhi<|im_end|>")
    assert (ids[0], ids[-1]) == (smollm2.bos_id, smollm2.eos_id) == (1, 2)
    assert smollm2.decode(ids) == "user\nhi"
    assert smollm2.decode(ids, skip_special_tokens=False) == "<|im_start|>user\nhi<|im_end|>"
    assert smollm2.id_to_token(2) == "<|im_end|>"
    assert {1, 2} <= smollm2.special_ids
    assert smollm2.vocab_size == 49152


def test_a_batch_is_its_texts(gemma3):
    assert gemma3.encode_batch([PROMPT, "a"]) == [gemma3.encode(PROMPT), gemma3.encode("a")]


def test_numbers_split_as_each_family_wants():
    def split(pre, text):
        letters = {chr(c): i for i, c in enumerate(range(33, 127))} | {"Ġ": 94}
        backend = build_tokenizer(
            {
                "tokenizer.ggml.model": "gpt2",
                "tokenizer.ggml.pre": pre,
                "tokenizer.ggml.tokens": list(letters),
                "tokenizer.ggml.merges": [],
            }
        )
        words = backend.pre_tokenizer.pre_tokenize_str(text)
        return [word.replace("Ġ", " ") for word, _ in words]

    assert split("smollm", "in 1234") == ["in", " ", "1", "2", "3", "4"]
    assert split("gpt-2", "in 1234") == ["in", " 1234"]
    assert split("qwen2", "in 1234") == ["in", " ", "1", "2", "3", "4"]
    assert split("llama-bpe", "in 1234") == ["in", " ", "123", "4"]
    for pre in PRE_TOKENIZERS:
        assert "".join(split(pre, "a b'll 12!")) == "a b'll 12!"


def test_an_unknown_kind_names_the_way_out():
    base = {"tokenizer.ggml.tokens": ["a"], "tokenizer.ggml.merges": []}
    for metadata, message in (
        ({}, "holds no tokenizer: pass --tokenizer"),
        (base | {"tokenizer.ggml.model": "rwkv"}, "kind `rwkv`"),
        (
            base | {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "new"},
            "unknown pre-tokenizer `new`: pass --tokenizer",
        ),
    ):
        with pytest.raises(CheckpointError, match=message):
            build_tokenizer(metadata)


def test_sentencepiece_bos_and_space_prefix_follow_the_metadata():
    tokens = ["<unk>", "<s>", "</s>", "▁", "a", "b", "ab", "▁ab"]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": np.array([0, 0, 0, -4, -5, -6, -1, -2], np.float32),
        "tokenizer.ggml.token_type": np.array([2, 3, 3, 1, 1, 1, 1, 1], np.int32),
    }
    backend = build_tokenizer(metadata)
    assert backend.encode("ab").tokens == ["▁ab"]
    backend = build_tokenizer(metadata | {"tokenizer.ggml.add_space_prefix": False})
    assert backend.encode("ab").tokens == ["ab"]
    assert backend.encode("ab ab").tokens == ["ab", "▁ab"]


def test_a_folder_is_read_without_transformers(tmp_path, smollm2):
    smollm2.backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": {"content": "<|im_end|>"}, "chat_template": "old"})
    )
    (tmp_path / "chat_template.jinja").write_text("new")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode(PROMPT) == smollm2.encode(PROMPT)
    assert (tokenizer.eos_id, tokenizer.bos_id) == (2, None)
    assert tokenizer.chat_templates == {"default": "new"}


@pytest.mark.parametrize(
    ("add_bos", "first"), [(True, 1), (False, 504), (None, 504)], ids=["yes", "no", "unsaid"]
)
def test_a_llama_folder_says_itself_whether_it_wants_a_bos(tmp_path, smollm2, add_bos, first):
    smollm2.backend.save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<|im_start|>"}
    if add_bos is not None:
        config["add_bos_token"] = add_bos
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_tokenizer(tmp_path).encode(PROMPT)[0] == first


def test_a_damaged_folder_is_one_sentence(tmp_path):
    with pytest.raises(CheckpointError, match="holds no tokenizer: pass --tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model"')
    with pytest.raises(CheckpointError, match="is not valid JSON"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_tokenizer(tmp_path)


def test_end_tokens_come_from_all_places(smollm2):
    checkpoint = open_checkpoint("smollm2-135m")
    assert eos_token_ids(checkpoint) == [2, 0]
    assert eos_token_ids(checkpoint, smollm2) == [2, 0]
