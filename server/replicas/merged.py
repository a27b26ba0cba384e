"""What replicas say of themselves, as one: /metrics with a label for each, /load as a sum."""

import json
from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from octavo.server.replicas.exchange import Answer, Head

MERGED = frozenset({"/metrics", "/load"})
LABEL = "replica"


def merged(path: str, answers: Sequence[Answer]) -> Answer:
    """One answer of several to the same question; a refusal of one is the answer."""
    refused = [answer for answer in answers if answer.head.status != 200]
    if refused:
        return refused[0]
    if path == "/load":
        load = sum(json.loads(answer.body)["server_load"] for answer in answers)
        body, kind = json.dumps({"server_load": load}).encode(), b"application/json"
    else:
        body = generate_latest(_registry(_Families(answers)))
        kind = b"text/plain; version=0.0.4; charset=utf-8"
    headers = [(b"content-type", kind), (b"content-length", str(len(body)).encode())]
    return Answer(Head(200, headers), body, "")


def _registry(families: "_Families") -> CollectorRegistry:
    registry = CollectorRegistry()
    registry.register(families)
    return registry


class _Families:
    """Every sample with the name of the replica that has it."""

    def __init__(self, answers: Sequence[Answer]) -> None:
        self._answers = answers

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for answer in self._answers:
            for family in text_string_to_metric_families(answer.body.decode()):
                known = families.setdefault(
                    family.name, Metric(family.name, family.documentation, family.type)
                )
                for sample in family.samples:
                    labels = {**sample.labels, LABEL: answer.replica}
                    known.samples.append(sample._replace(labels=labels))
        yield from families.values()
