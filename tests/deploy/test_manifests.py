"""The manifests in deploy/ are what Kubernetes and our own command line take, and fit each other.

No cluster runs them here. Their fields are checked against `schemas.yaml`, the part of each API
that they use, and, where kubernetes-validate is installed (`make deploy`), against Kubernetes' own.
"""

import argparse
import math
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from octavo.cli import serve
from octavo.cli.options import config_from_args
from octavo.engine.config import parse_mesh

ROOT = Path(__file__).resolve().parents[2]
SCHEMAS: dict[str, Any] = yaml.safe_load((Path(__file__).parent / "schemas.yaml").read_text())
FILES = sorted((ROOT / "deploy" / "kubernetes").glob("*.yaml"))
VERSIONS = ("1.30.0", "1.37.0")
CUSTOM = {"LeaderWorkerSet", "InferencePool", "HTTPRoute"}  # not of Kubernetes itself

DOCUMENTS = [
    pytest.param(document, id=f"{path.stem}-{document['kind']}")
    for path in FILES
    for document in yaml.safe_load_all(path.read_text())
]
OBJECTS: list[dict[str, Any]] = [parameter.values[0] for parameter in DOCUMENTS]  # type: ignore[misc]


def check(document: dict[str, Any]) -> None:
    """ValidationError for a field that the document's API does not have, or has otherwise."""
    kind = document["kind"]
    whole = {
        "metadata": {"$ref": "#/$defs/metadata"},
        "apiVersion": True,
        "kind": True,
        "spec": True,
    }
    rule = {"properties": whole, "required": [*whole], "additionalProperties": False}
    jsonschema.validate(document, {**SCHEMAS, "allOf": [rule, {"$ref": f"#/$defs/{kind}"}]})


def of_kind(kind: str) -> list[dict[str, Any]]:
    return [document for document in OBJECTS if document["kind"] == kind]


def templates(document: dict[str, Any]) -> list[dict[str, Any]]:
    """The pod templates of a document; a leader's comes first."""
    spec = document["spec"]
    if document["kind"] == "LeaderWorkerSet":
        parts = spec["leaderWorkerTemplate"]
        return [parts["leaderTemplate"], parts["workerTemplate"]]
    return [spec["template"]] if document["kind"] == "Deployment" else []


def containers(document: dict[str, Any]) -> list[dict[str, Any]]:
    return [template["spec"]["containers"][0] for template in templates(document)]


PODS = [parameter for parameter in DOCUMENTS if templates(parameter.values[0])]  # type: ignore[arg-type]
GROUPS = [p for p in PODS if p.values[0]["kind"] == "LeaderWorkerSet"]  # type: ignore[index]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_manifest_has_only_fields_that_its_api_has(document):
    check(document)


def test_a_misspelt_field_or_a_number_for_a_text_is_found():
    good = of_kind("Deployment")[0]
    changes: tuple[dict[str, Any], ...] = (
        {"terminationGracePeriod": 3},
        {"nodeSelector": {"gpu": 1}},
        {"containers": []},
    )
    for change in changes:
        template = {"spec": {**good["spec"]["template"]["spec"], **change}}
        bad = {**good, "spec": {**good["spec"], "template": template}}
        with pytest.raises(jsonschema.ValidationError):
            check(bad)
    for kind, field in (("LeaderWorkerSet", "size"), ("InferencePool", "extensionRef")):
        whole = of_kind(kind)[0]
        with pytest.raises(jsonschema.ValidationError):
            check({**whole, "spec": {**whole["spec"], field: 2}})


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("document", DOCUMENTS)
def test_kubernetes_own_schemas_take_every_manifest(document, version):
    kubernetes = pytest.importorskip("kubernetes_validate")
    if document["kind"] not in CUSTOM:
        kubernetes.validate(document, version, strict=True)
    for template in templates(document):
        pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "of-a-set"}}
        kubernetes.validate({**pod, "template": template}, version, strict=True)


@pytest.mark.parametrize("document", PODS)
def test_the_command_line_takes_what_the_pods_give_it(document):
    parser = argparse.ArgumentParser()
    serve.register(parser.add_subparsers())
    for container in containers(document):
        args = parser.parse_args(["serve", *container["args"]])
        config_from_args(args)
        settings = serve.settings_from_args(args)
        grace = templates(document)[0]["spec"]["terminationGracePeriodSeconds"]
        assert grace > settings.shutdown_timeout, "or streams are cut that might have ended"


@pytest.mark.parametrize("document", PODS)
def test_probes_ask_routes_that_the_server_has_on_a_port_that_it_opens(document):
    container = containers(document)[0]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports["http"] == 8000, "what the image's command listens on"
    asked = {name: container[name]["httpGet"] for name in container if name.endswith("Probe")}
    assert {name: get["path"] for name, get in asked.items()} == {
        "startupProbe": "/ready",
        "readinessProbe": "/ready",
        "livenessProbe": "/health",  # not /ready: a full queue must not restart a server
    }
    assert {get["port"] for get in asked.values()} == {"http"}


@pytest.mark.parametrize("document", PODS)
def test_every_mount_has_its_volume_and_the_cache_lies_where_the_image_has_it(document):
    for template, container in zip(templates(document), containers(document), strict=True):
        volumes = {volume["name"] for volume in template["spec"]["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes
        image = ROOT / "deploy" / f"Dockerfile.{container['image'].partition(':')[2]}"
        cache = next(m["mountPath"] for m in container["volumeMounts"] if m["name"] == "cache")
        assert f"VOLUME {cache}\n" in image.read_text()


@pytest.mark.parametrize("document", GROUPS)
def test_every_pod_of_a_group_runs_the_same_command_and_knows_its_place(document):
    leader, worker = containers(document)
    for same in ("image", "args", "env", "resources"):
        assert leader[same] == worker[same], same
    environment = {entry["name"]: entry.get("value") for entry in leader["env"]}
    assert environment["OCTAVO_HOSTS"] == "$(LWS_GROUP_SIZE)"
    assert environment["OCTAVO_HOST_INDEX"] == "$(LWS_WORKER_INDEX)"
    port = next(p["containerPort"] for p in leader["ports"] if p["name"] == "leader")
    assert environment["OCTAVO_LEADER"] == f"$(LWS_LEADER_ADDRESS):{port}"


@pytest.mark.parametrize("document", GROUPS)
def test_the_mesh_of_a_group_has_as_many_devices_as_its_hosts(document):
    container = containers(document)[0]
    mesh = parse_mesh(container["args"][container["args"].index("--mesh") + 1])
    limits = container["resources"]["limits"]
    each = int(limits.get("nvidia.com/gpu") or limits["google.com/tpu"])
    hosts = document["spec"]["leaderWorkerTemplate"]["size"]
    assert math.prod(mesh.values()) == each * hosts
    topology = (
        templates(document)[0]["spec"]
        .get("nodeSelector", {})
        .get("cloud.google.com/gke-tpu-topology")
    )
    if topology is not None:
        assert math.prod(map(int, topology.split("x"))) == each * hosts


@pytest.mark.parametrize("service", of_kind("Service"), ids=lambda s: s["metadata"]["name"])
def test_a_service_finds_the_pods_that_have_the_endpoint_and_no_others(service):
    wanted = service["spec"]["selector"].items()
    found = [
        (place, container)
        for document in OBJECTS
        for place, (template, container) in enumerate(
            zip(templates(document), containers(document), strict=True)
        )
        if wanted <= template["metadata"]["labels"].items()
    ]
    assert [place for place, _ in found] == [0], "a leader, or the only kind of pod"
    names = {port["name"] for port in found[0][1]["ports"]}
    assert {port["targetPort"] for port in service["spec"]["ports"]} <= names


def test_the_pool_holds_the_pods_of_the_deployment_and_the_route_leads_to_it():
    pool, deployment, route = (
        of_kind(kind)[0] for kind in ("InferencePool", "Deployment", "HTTPRoute")
    )
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert pool["spec"]["selector"]["matchLabels"].items() <= labels.items()
    ports = [port["containerPort"] for port in containers(deployment)[0]["ports"]]
    assert [port["number"] for port in pool["spec"]["targetPorts"]] == ports
    backend = route["spec"]["rules"][0]["backendRefs"][0]
    assert pool["apiVersion"].startswith(backend["group"] + "/")
    assert (backend["kind"], backend["name"]) == (pool["kind"], pool["metadata"]["name"])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_manifest_says_how_to_apply_it_and_that_no_cluster_has_run_it(path):
    text = path.read_text()
    assert f"kubectl apply -f {path.relative_to(ROOT)}" in text
    assert "not run on a cluster yet" in text


def test_the_settings_in_the_file_for_ray_serve_are_ones_that_there_are():
    from octavo.server.replicas.scale import parts_of

    document = yaml.safe_load((ROOT / "deploy" / "ray-serve.yaml").read_text())
    application = document["applications"][0]
    config, settings, scale = parts_of(application["args"])
    assert scale.gpus == 1 and scale.max_replicas == 4 and settings.shutdown_timeout == 120
    assert config.model
    module, _, function = application["import_path"].partition(":")
    source = ROOT / f"{module.replace('.', '/')}.py"
    assert f"def {function}(" in source.read_text()
