"""What a GPU's record is made with, and what it refuses."""

from dataclasses import replace

import pytest

from octavo.backends import gpu, gpu_choices
from octavo.backends.record import BackendError
from octavo.engine.config import EngineConfig
from octavo.pallas_kernels.attention.gpu import TUNING


def test_nothing_asked_is_what_was_measured_to_be_the_fastest() -> None:
    assert gpu_choices.read("") == gpu_choices.Choices()


def test_names_and_values_override_what_was_measured() -> None:
    found = gpu_choices.read("tile=32, parts=1056, stages=3, xla_gpu_autotune_level=4")
    assert found.tuning.decode == replace(TUNING.decode, tile=32, parts=1056)
    assert found.tuning.hopper.stages == 3
    assert gpu.compiler_options(found, 8) == {"xla_gpu_autotune_level": 4}


def test_products_of_many_tokens_are_left_to_cublas() -> None:
    never = gpu_choices.read("cublas_from=1000000")
    assert gpu.compiler_options(gpu.CHOICES, 128) == {"xla_gpu_enable_triton_gemm": False}
    assert gpu.compiler_options(gpu.CHOICES, 64) == gpu.compiler_options(never, 8192) == {}


@pytest.mark.parametrize(("text", "said"), [("nonsense=1", "`nonsense`"), ("parts=x", "`parts`")])
def test_a_name_that_does_not_exist_is_refused(text: str, said: str) -> None:
    with pytest.raises(BackendError, match=said):
        gpu_choices.read(text)


def test_a_card_without_8_bit_floats_refuses_an_fp8_cache() -> None:
    config = EngineConfig(model="x", kv_cache_dtype="fp8")
    assert gpu.why_not(config, (9, 0)) is None
    assert "8.6 has no 8-bit floats" in str(gpu.why_not(config, (8, 6)))


def test_an_option_that_this_xla_does_not_have_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    known, unknown = {"xla_gpu_autotune_level": "4"}, {"xla_gpu_of_another_year": "X"}
    monkeypatch.setattr(gpu, "GRAPHS", known)
    monkeypatch.setattr(gpu, "NCCL", {})
    assert gpu.mesh_options(8) == gpu.mesh_options(256) == known
    monkeypatch.setattr(gpu, "NCCL", unknown)
    assert gpu.mesh_options(8) == gpu.mesh_options(256) == known
    monkeypatch.setattr(gpu, "GRAPHS", unknown)
    assert gpu.mesh_options(8) == gpu.mesh_options(256) == {}
