"""Which executor a machine gets, and what it is told where there is none."""

import pytest

from octavo.backends.neuron import choose, errors
from octavo.backends.neuron.settings import BadSetting, Settings
from octavo.backends.select import select


@pytest.fixture(autouse=True)
def nothing_of_neuron(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("EXECUTOR", "COMPILER", "CACHE", "REQUIRE_CACHED", "COMPILE_TIMEOUT"):
        monkeypatch.delenv(f"OCTAVO_NEURON_{name}", raising=False)
    monkeypatch.setenv("OCTAVO_NEURON_LIBNRT", "/nowhere/libnrt.so.1")
    monkeypatch.setenv("NEURON_RT_STOCHASTIC_ROUNDING_EN", "0")
    monkeypatch.setenv("NEURON_RT_EXEC_TIMEOUT", "600")


def test_a_machine_without_neuron_is_told_the_next_step() -> None:
    with pytest.raises(errors.NoNeuronDevice, match="/nowhere.*docs/neuron.md.*--device cpu"):
        select("neuron")


def test_a_plugin_that_was_asked_for_by_name_and_is_not_there_is_named(monkeypatch) -> None:
    monkeypatch.setenv("OCTAVO_NEURON_EXECUTOR", "pjrt")
    with pytest.raises(errors.PackageMissing, match="libneuronxla"):
        select("neuron")


def test_an_instance_of_no_known_kind_is_refused_and_its_cores_given_back(
    emulator, emulator_library, monkeypatch
) -> None:
    monkeypatch.setenv("OCTAVO_NEURON_LIBNRT", str(emulator_library))
    emulator.become(family=1)
    with pytest.raises(errors.NoNeuronDevice, match="family 1"):
        select("neuron")


def test_the_emulated_instance_gets_the_record_of_its_target(
    emulator, emulator_library, monkeypatch
) -> None:
    monkeypatch.setenv("OCTAVO_NEURON_LIBNRT", str(emulator_library))
    emulator.become(family=3)
    backend = select("neuron")
    assert "Trainium1" in backend.reason and backend.compile is not None
    assert 0 < backend.memory_limit() < 16 << 30
    backend.close()


@pytest.mark.parametrize(
    "name, value, says",
    [
        ("OCTAVO_NEURON_EXECUTOR", "fast", "auto, pjrt or aot"),
        ("OCTAVO_NEURON_REQUIRE_CACHED", "maybe", "1 or 0"),
        ("OCTAVO_NEURON_COMPILE_TIMEOUT", "long", "a number"),
    ],
)
def test_a_variable_that_says_nothing_is_refused(monkeypatch, name, value, says) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(BadSetting, match=f"{name}.*{says}"):
        Settings.read()


def test_a_compiler_of_the_users_own_is_known_by_its_digest(tmp_path, monkeypatch) -> None:
    program = tmp_path / "neuronx-cc"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("OCTAVO_NEURON_COMPILER", str(program))
    first = Settings.read().compiler()
    program.write_text("#!/bin/sh\nexit 1\n")
    second = Settings.read().compiler()
    assert first is not None and second is not None and first.version != second.version
    monkeypatch.setenv("OCTAVO_NEURON_COMPILER", "/nowhere/neuronx-cc")
    assert Settings.read().compiler() is None


def test_models_that_only_read_are_refused_with_what_to_do() -> None:
    class Config:
        runner = "pooling"

    assert "--device cpu" in (choose._why_not(Config()) or "")
