"""What pip gets: the folders that setup.py maps, the extras, and versions that were tested."""

import re
import tomllib
from pathlib import Path

import pytest

from octavo.models.sources.builtin import MODELS

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONSTRAINTS = sorted((ROOT / "constraints").glob("*.txt"))

pytestmark = pytest.mark.smoke


def pins(path: Path) -> dict[str, str]:
    """name: version of a constraints file."""
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    pairs = [line.split("==") for line in lines]
    return {re.sub(r"[_.]", "-", name.lower()): version for name, version in pairs}


def test_every_folder_is_linked_where_static_tools_look() -> None:
    setup = (ROOT / "setup.py").read_text()
    folders = re.findall(r'"(\w+)"', setup.split("FOLDERS = (")[1].split(")")[0])
    assert len(folders) == 6
    for folder in folders:
        link = ROOT / "octavo" / folder
        assert link.is_symlink()
        assert link.resolve() == ROOT / folder


@pytest.mark.parametrize("path", CONSTRAINTS, ids=lambda path: path.name)
def test_constraints_pin_every_dependency(path: Path) -> None:
    pinned = pins(path)
    names = [re.split(r"[\[<>=]", line)[0].lower() for line in PROJECT["dependencies"]]
    assert [name for name in names if re.sub(r"[_.]", "-", name) not in pinned] == []


def test_the_constraints_span_the_supported_jax() -> None:
    versions = [tuple(map(int, pins(path)["jax"].split(".")[:2])) for path in CONSTRAINTS]
    assert min(versions) == (0, 10)
    assert max(versions) == (0, 12)


def test_the_neuron_extra_cannot_be_met_by_the_stubs_of_the_same_names() -> None:
    exact = dict(line.split("==") for line in PROJECT["optional-dependencies"]["neuron"])
    assert exact["neuronx-cc"].startswith("2.27.")
    assert exact["libneuronxla"].startswith("3.0.")
    assert exact["jax-neuronx"].startswith("0.10.0.")


def test_there_is_an_extra_for_every_accelerator() -> None:
    assert {"tpu", "cuda", "cuda12", "neuron", "demo", "test"} <= set(
        PROJECT["optional-dependencies"]
    )


def test_the_demo_extra_is_the_package_of_the_built_in_model() -> None:
    ((package, version, _),) = MODELS["smollm2-135m"].packages
    assert PROJECT["optional-dependencies"]["demo"] == [f"{package}=={version}"]
