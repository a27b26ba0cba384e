"""Requests made up from /openapi.json: none breaks the server, every answer is as described."""

import os
import re

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from octavo.server.routes.table import ENDPOINTS

CHECKS = (
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
)
EXAMPLES = int(os.environ.get("OCTAVO_FUZZ_EXAMPLES", "20"))  # for each route
QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]


ROUTES = [
    pytest.param(endpoint.method, endpoint.path, mode, id=f"{endpoint.path} {mode.value}")
    for endpoint in ENDPOINTS
    for mode in GenerationMode
    if endpoint.path != "/openapi.json"  # this is where the others come from
    and (endpoint.body is not None or mode is GenerationMode.POSITIVE)  # else nothing can be wrong
]


@pytest.fixture(scope="module")
def operations(server):
    described = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    found = [result.ok() for result in described.get_all_operations()]
    return {(operation.method.upper(), operation.path): operation for operation in found}


@pytest.mark.parametrize(("method", "path", "mode"), ROUTES)
def test_made_up_requests_get_described_answers(method, path, mode, operations, server):
    operation = operations[method, re.sub(r":\w+\}", "}", path)]

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=QUIET, derandomize=True)
    def ask(case):
        response = case.call(timeout=30)
        case.validate_response(response, checks=CHECKS)

    ask()
    assert server.process.poll() is None


def test_good_requests_are_still_answered(server):
    answer = server.post("/v1/completions", {"prompt": "still here", "max_tokens": 2})
    assert answer.status_code == 200
