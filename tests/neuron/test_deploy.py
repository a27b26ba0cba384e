"""What deploys Octavo on Neuron is well-formed and names things that exist; nobody ran it here."""

import re
import subprocess
import tomllib
from collections.abc import Iterator
from configparser import ConfigParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from octavo.backends.neuron import detect, settings

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "deploy" / "neuron"


def project() -> dict[str, Any]:
    facts: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return facts


def shell_of(dockerfile: str) -> Iterator[str]:
    """What each RUN gives to a shell."""
    for step in re.findall(r"^RUN ((?:.*\\\n)*.*)$", dockerfile, re.M):
        yield re.sub(r"\\\n", "", step)


def test_the_manifest_asks_for_a_chip_and_probes_what_the_server_has() -> None:
    documents = list(yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text()))
    kinds = {document["kind"]: document for document in documents}
    assert set(kinds) == {"PersistentVolumeClaim", "Deployment", "Service"}
    deployment = kinds["Deployment"]["spec"]
    assert deployment["strategy"]["type"] == "Recreate"
    assert deployment["selector"]["matchLabels"] == deployment["template"]["metadata"]["labels"]
    (container,) = deployment["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["aws.amazon.com/neuron"] == "1"
    assert container["securityContext"]["capabilities"]["add"] == ["IPC_LOCK"]
    paths = {
        container[f"{p}Probe"]["httpGet"]["path"] for p in ("startup", "readiness", "liveness")
    }
    assert paths == {"/ready", "/health"}
    claim = deployment["template"]["spec"]["volumes"][0]["persistentVolumeClaim"]["claimName"]
    assert claim == kinds["PersistentVolumeClaim"]["metadata"]["name"]


def test_the_unit_ends_every_child_before_it_starts_again() -> None:
    unit = ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(FOLDER / "octavo.service")
    service = unit["Service"]
    assert service["KillMode"] == "mixed" and service["Restart"] == "on-failure"
    assert "octavo serve ${MODEL} --device neuron" in service["ExecStart"]


def test_the_image_takes_addresses_as_arguments_and_pins_the_runtime() -> None:
    text = (FOLDER / "Dockerfile").read_text()
    addresses = ("NEURON_APT", "NEURON_KEY", "NEURON_PIP")
    for argument in ("BASE=ubuntu:24.04", "WITH=compiler", *addresses):
        assert f"ARG {argument}\n" in text
    for package in ("runtime-lib=$RUNTIME", "collectives=$COLLECTIVES", "tools=$TOOLS"):
        assert f"aws-neuronx-{package}" in text
    extra = dict(line.split("==") for line in project()["optional-dependencies"]["neuron"])
    assert f"jax=={extra['jax']} jaxlib=={extra['jaxlib']} ." in text
    manifest = (FOLDER / "kubernetes.yaml").read_text()
    assert "--uid 1001 octavo" in text and "runAsUser: 1001" in manifest
    copied = re.search(r"python (scripts/\S+)", text)
    assert copied is not None and (ROOT / copied[1]).exists()


@pytest.mark.parametrize("file", ["Dockerfile", "octavo.service", "kubernetes.yaml"])
def test_every_file_says_that_it_was_not_run(file: str) -> None:
    assert re.search(r"[Nn]ot (built or )?(run|applied)", (FOLDER / file).read_text())


def test_every_step_of_the_image_is_a_script_that_a_shell_can_read() -> None:
    steps = list(shell_of((FOLDER / "Dockerfile").read_text()))
    assert len(steps) == 2
    for step in steps:
        subprocess.run(["sh", "-n", "-c", step], check=True, timeout=10)
    if Path(detect.LIBNRT).exists():
        return
    # Without AWS's addresses and on a plain base the first step says what to give.
    first = subprocess.run(["sh", "-c", steps[0]], env={}, capture_output=True, text=True)
    assert first.returncode == 1 and "give --build-arg BASE" in first.stdout


def test_the_guide_lists_the_variables_that_the_code_reads() -> None:
    source = Path(settings.__file__).read_text()
    source += (ROOT / "backends" / "neuron" / "detect.py").read_text()
    read = set(re.findall(r"\b(?:OCTAVO_NEURON|NEURON_LOGICAL)_\w+", source))
    guide = (ROOT / "docs" / "neuron.md").read_text()
    assert read == set(re.findall(r"^\| `((?:OCTAVO_NEURON|NEURON_LOGICAL)_\w+)`", guide, re.M))
