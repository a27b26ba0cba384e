"""EncoderCore beside transformers: texts of many lengths at once, each as if it were alone."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers.processors import TemplateProcessing

from octavo.engine.config import ConfigError, EngineConfig
from octavo.engine.encoder import MOST_FAILURES, EncoderCore
from octavo.engine.messages import EncodeRequest, Output
from octavo.engine.planning import plan_memory
from octavo.engine.runner import choose_runner
from octavo.engine.text.opened import open_text
from octavo.engine.text.reading import Text, Texts
from tests.models.tiny import COMMON, tiny_model
from tests.server.tiny_model import write_tiny_model

TOLERANCE = 2e-5  # values of size 1 to 4, float32 sums in another order
SIZES: dict[str, Any] = {"device": "cpu", "compilation_cache": "none", "max_num_batched_tokens": 64}
BERT = {k: v for k, v in COMMON.items() if k != "num_key_value_heads"} | {"type_vocab_size": 2}
EVERY = ("Transformer", "Pooling", "Normalize")


def random_bert(name: str = "BertModel", **own: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.BertConfig(**BERT | own)
    config._attn_implementation = "eager"
    return getattr(transformers, name)(config).eval()


def write_modules(folder: Path, mode: str, kinds: tuple[str, ...] = EVERY) -> None:
    """What sentence-transformers writes."""
    modules = [
        {"path": "1_Pooling" if kind == "Pooling" else "", "type": f"sentence_transformers.{kind}"}
        for kind in kinds
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({f"pooling_mode_{mode}": True}))


def start(folder: Path, **settings: Any) -> EncoderCore:
    config = EngineConfig(model=str(folder), **SIZES | settings)
    config.validate()
    return EncoderCore(config)


def ask(core: EncoderCore, texts: list[Text]) -> np.ndarray:
    """f32[n, size], through as many turns as it takes."""
    for i, text in enumerate(texts):
        core.add(text.request(i, str(i), 0.0))
    return collect(core.drain(), len(texts))


def collect(outputs: list[Output], count: int) -> np.ndarray:
    found = {e.handle: np.frombuffer(e.vector, "<f4") for o in outputs for e in o.encoded}
    ended = [f for o in outputs for f in o.finished]
    assert sorted(f.handle for f in ended if f.reason == "stop") == sorted(found)
    return np.stack([found[i] for i in range(count)])


def prompts(count: int, longest: int = 60) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(3, 128, rng.integers(1, longest)).tolist() for _ in range(count)]


@pytest.mark.parametrize(
    ("mode", "pooled"),
    [
        ("cls_token", lambda h: h[0]),
        ("mean_tokens", lambda h: h.mean(0)),
        ("max_tokens", lambda h: h.max(0).values),
        ("lasttoken", lambda h: h[-1]),
    ],
)
def test_texts_read_together_are_as_alone(tmp_path: Path, mode: str, pooled: Any) -> None:
    theirs = random_bert()
    theirs.save_pretrained(tmp_path)
    write_modules(tmp_path, mode)
    core = start(tmp_path)
    many = prompts(40)
    with torch.no_grad():
        hidden = [theirs(torch.tensor([ids])).last_hidden_state[0] for ids in many]
    want = np.stack([pooled(h).numpy() for h in hidden])
    np.testing.assert_allclose(ask(core, [Text(ids) for ids in many]), want, atol=TOLERANCE)
    assert core.stats().compiles_after_ready == 0
    ready = core.ready()
    assert ready.pooler is not None and (ready.pooler.task, ready.pooler.size) == ("embed", 32)
    core.close()


def test_a_cross_encoder_gives_the_numbers_of_transformers(tmp_path: Path) -> None:
    theirs = random_bert("BertForSequenceClassification", num_labels=1)
    theirs.save_pretrained(tmp_path)
    core = start(tmp_path)
    texts = [Text(ids, max(1, len(ids) // 2)) for ids in prompts(12) if len(ids) > 1]
    want = []
    for text in texts:
        types = [0] * text.second + [1] * (len(text.ids) - text.second)
        with torch.no_grad():
            out = theirs(torch.tensor([list(text.ids)]), token_type_ids=torch.tensor([types]))
        want.append(out.logits[0].numpy())
    np.testing.assert_allclose(ask(core, texts), np.stack(want), atol=TOLERANCE)
    assert core.ready().pooler.task == "score"
    core.close()


@pytest.fixture(scope="module")
def last_token(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Path]]:
    """A decoder as Qwen3-Embedding is one: its names bare, and a tokenizer that appends an end."""
    folder = write_tiny_model(tmp_path_factory.mktemp("last"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    backend = tokenizer.backend_tokenizer
    backend.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    backend.save(str(folder / "tokenizer.json"))
    theirs = tiny_model("qwen3", vocab_size=259).model
    theirs.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"architectures": ["Qwen3ForCausalLM"], "tie_word_embeddings": False})
    )
    write_modules(folder, "lasttoken")
    yield theirs, folder


def test_a_decoder_gives_the_state_of_the_end_that_its_tokenizer_appends(
    last_token: tuple[Any, Path],
) -> None:
    theirs, folder = last_token
    core = start(folder)
    texts = Texts(open_text(core.config), core.ready())
    read = [texts.one(text) for text in ("a river", "b", "a much longer text about the river")]
    assert all(text.ids[-1] == 2 for text in read)
    with torch.no_grad():
        want = [theirs(torch.tensor([list(t.ids)])).last_hidden_state[0, -1] for t in read]
    np.testing.assert_allclose(ask(core, read), np.stack(want), atol=1e-4)
    cut = Texts(open_text(core.config), core.ready(), 5).one("a river that is long")
    assert len(cut.ids) == 5 and cut.ids[-1] == 2
    core.close()


def test_a_window_of_a_decoder_holds_among_packed_texts(tmp_path: Path) -> None:
    theirs = tiny_model("mistral")
    theirs.save_pretrained(tmp_path)
    core = start(tmp_path, runner="pooling")
    many = prompts(9, longest=30)
    with torch.no_grad():
        want = [theirs.model(torch.tensor([ids])).last_hidden_state[0, -1] for ids in many]
    np.testing.assert_allclose(ask(core, [Text(i) for i in many]), np.stack(want), atol=1e-4)
    core.close()


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EncoderCore]:
    folder = tmp_path_factory.mktemp("bert")
    random_bert().save_pretrained(folder)
    core = start(folder, max_num_queued_reqs=3)
    yield core
    core.close()


def request(handle: int, length: int = 5) -> EncodeRequest:
    return Text(list(range(3, 3 + length))).request(handle, "", 0.0)


def test_an_aborted_text_is_never_heard_of_again(bert: EncoderCore) -> None:
    for handle in (1, 2, 3):
        bert.add(request(handle))
    bert.abort([2, 99])
    first = bert.turn()  # two texts are on their way, or done
    bert.abort([3])
    outputs = first + bert.drain()
    assert {e.handle for o in outputs for e in o.encoded} - {3} == {1}
    assert bert.stats().waiting == bert.stats().running == 0
    assert not bert.has_work()


def test_what_is_too_long_or_too_much_is_refused(bert: EncoderCore) -> None:
    with pytest.raises(ValueError, match="needs 1 to 256 tokens here, got 257"):
        bert.add(Text([5] * 257).request(1, "", 0.0))
    with pytest.raises(ValueError, match="got 0"):
        bert.add(Text([]).request(1, "", 0.0))
    for handle in range(4):
        bert.add(request(handle))
    ended = [f for o in bert.drain() for f in o.finished]
    assert [(f.handle, f.status) for f in ended if f.reason == "error"] == [(3, 503)]
    assert len(ended) == 4


def test_a_batch_that_fails_takes_only_its_own_texts_along(bert: EncoderCore) -> None:
    programs = bert.programs.by_shape
    kept = dict(programs)

    def broken(*_: Any) -> None:
        raise RuntimeError("the device coughed")

    programs.update(dict.fromkeys(programs, broken))
    bert.add(request(1))
    [finish] = [f for o in bert.drain() for f in o.finished]
    assert (finish.handle, finish.reason, finish.status) == (1, "error", 500)
    assert "the device coughed" in finish.message
    programs.update(kept)
    bert.add(request(2))
    assert [e.handle for o in bert.drain() for e in o.encoded] == [2]
    programs.update(dict.fromkeys(programs, broken))
    with pytest.raises(RuntimeError, match="coughed"):
        for handle in range(MOST_FAILURES):
            bert.add(request(handle))
            bert.drain()
    programs.update(kept)
    bert.abort(range(MOST_FAILURES))
    bert.drain()


def test_the_runner_is_what_the_model_was_made_for(
    last_token: tuple[Any, Path], tmp_path: Path
) -> None:
    folder = last_token[1]
    assert choose_runner(EngineConfig(model=str(folder))) == "pooling"
    assert choose_runner(EngineConfig(model=str(folder), runner="generate")) == "generate"
    alone = tmp_path / "alone"
    shutil.copytree(folder, alone, ignore=shutil.ignore_patterns("modules.json"))
    assert choose_runner(EngineConfig(model=str(alone))) == "generate"
    encoder = tmp_path / "encoder"
    random_bert().save_pretrained(encoder)
    assert choose_runner(EngineConfig(model=str(encoder))) == "pooling"
    with pytest.raises(ConfigError, match="BertModel only reads"):
        choose_runner(EngineConfig(model=str(encoder), runner="generate"))


def test_the_plan_of_a_reading_model_is_what_its_engine_takes(tmp_path: Path) -> None:
    random_bert().save_pretrained(tmp_path)
    config = EngineConfig(model=str(tmp_path), **SIZES)
    plan, core = plan_memory(config), start(tmp_path)
    assert plan.weights == core.plan.weights and plan.workspace == core.plan.workspace > 0
    assert plan.lines()[-1] == "reads texts of up to 256 tokens, 256 together"
    with pytest.raises(ConfigError, match="trained for 256; use --max-model-len 256"):
        start(tmp_path, max_model_len=512)
    core.close()
