"""What is found on a machine, whatever other indexes hold under AWS's names."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from octavo.backends.neuron import detect, errors, targets

REAL = {"libneuronxla": "3.0.5356.0", "neuronxcc": "2.27.5334.0+f702b353"}


def real(module: str) -> SimpleNamespace:
    return SimpleNamespace(__version__=REAL[module])


def stub_that_raises(module: str) -> SimpleNamespace:
    raise ImportError("WRONG PACKAGE. Please install the package from Neuron Repository")


def nothing(module: str) -> SimpleNamespace:
    raise ModuleNotFoundError(f"No module named {module!r}")


@pytest.fixture
def instance(tmp_path: Path) -> Path:
    """The files of an inf2.24xlarge."""
    for i in range(6):
        (tmp_path / "dev").mkdir(exist_ok=True)
        (tmp_path / "dev" / f"neuron{i}").touch()
    (tmp_path / "dev" / "neuron_aux").touch()
    for path, text in ((detect.PRODUCT, "inf2.24xlarge"), (detect.DRIVER, "2.30.2.0")):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).write_text(text + "\n")
    return tmp_path


def test_an_instance_is_recognized_by_its_devices_and_its_name(instance) -> None:
    found = detect.find(instance, real)
    assert len(found.chips) == 6 and found.driver == "2.30.2.0"
    assert found.target is targets.target_of("inf2")
    assert (found.plugin, found.compiler_version) == (REAL["libneuronxla"], REAL["neuronxcc"])
    detect.require_device(found)


def test_a_machine_without_anything_says_so_and_raises_nothing(tmp_path) -> None:
    found = detect.find(tmp_path, nothing)
    assert found.chips == () and found.target is None and not found.plugin
    assert {"libnrt", "libneuronxla", "neuronx-cc"} <= set(found.problems)
    with pytest.raises(errors.NoNeuronDevice, match="/dev/neuron0.*--device cpu"):
        detect.require_device(found)


def test_devices_without_any_software_are_not_enough(instance) -> None:
    with pytest.raises(errors.NoNeuronDevice, match="libnrt"):
        detect.require_device(detect.find(instance, nothing))


def test_a_stub_that_raises_on_import_is_no_package(instance) -> None:
    assert "stub" in detect.find(instance, stub_that_raises).problems["libneuronxla"]
    with pytest.raises(errors.StubPackage, match="pip uninstall neuronx-cc"):
        detect.package_version("neuronxcc", "neuronx-cc", stub_that_raises)


def test_a_stub_of_which_only_metadata_was_installed_is_no_package(monkeypatch) -> None:
    monkeypatch.setattr(detect, "_metadata", lambda package: "1.0.post1")
    with pytest.raises(errors.StubPackage):
        detect.package_version("neuronxcc", "neuronx-cc", nothing)
    monkeypatch.setattr(detect, "_metadata", lambda package: "")
    with pytest.raises(errors.PackageMissing, match="docs/neuron.md"):
        detect.package_version("neuronxcc", "neuronx-cc", nothing)


def test_a_compiler_older_than_every_real_one_is_a_stub() -> None:
    old = SimpleNamespace(__version__="1.0.post1")
    with pytest.raises(errors.StubPackage):
        detect.package_version("neuronxcc", "neuronx-cc", lambda module: old)


def test_a_plugin_meets_only_the_jax_it_was_made_for() -> None:
    detect.check_jax("0.10.0")
    detect.check_jax("0.10.2")
    with pytest.raises(errors.JaxPinMismatch, match="pip install jax==0.10.0 jaxlib==0.10.0"):
        detect.check_jax("0.11.1")
