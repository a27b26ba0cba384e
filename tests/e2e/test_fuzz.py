"""Malformed requests against the real engine; `octavo bench fuzz` sends tens of thousands."""

import asyncio

from octavo.bench.fuzz import leftovers, storm
from octavo.cli.client import Endpoint


def test_malformed_requests_are_refused_and_leave_nothing_behind(launch):
    server = launch("--max-model-len", "128")
    endpoint = Endpoint.parse(server.url)
    found = asyncio.run(storm(endpoint, requests=1000, concurrency=16, seed=1))
    assert not found.faults
    assert found.good == 10 and not found.wrong
    assert len(found.answers) == 9, "every kind of damage was sent"
    assert found.answers["invalid UTF-8"].keys() == {"400"}
    assert not any(asyncio.run(leftovers(endpoint)).values())
