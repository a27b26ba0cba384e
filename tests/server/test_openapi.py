"""/openapi.json and /docs say what is served."""

import re

import httpx
import jsonschema

from octavo.server.routes.table import ENDPOINTS


def test_every_route_is_described_and_every_described_route_is_served(server):
    described = server.get("/openapi.json").json()
    assert described["openapi"].startswith("3.1")
    paths = {re.sub(r"\{(\w+):\w+\}", r"{\1}", e.path): e for e in ENDPOINTS}
    assert set(described["paths"]) == set(paths)
    for path in described["paths"]:
        if "{" not in path and "get" in described["paths"][path]:
            assert server.get(path).status_code == 200, path


def test_an_answer_fits_the_schema_that_is_described(server):
    described = server.get("/openapi.json").json()
    body = {"messages": [{"role": "user", "content": "hello there"}], "max_tokens": 4}
    answer = server.post("/v1/chat/completions", body).json()
    operation = described["paths"]["/v1/chat/completions"]["post"]
    schema = operation["responses"]["200"]["content"]["application/json"]["schema"]
    whole = {**schema, "components": described["components"]}
    jsonschema.validate(answer, whole)
    broken = {**answer, "choices": "none"}
    assert list(jsonschema.Draft202012Validator(whole).iter_errors(broken))


def test_an_error_fits_the_schema_that_is_described(server):
    described = server.get("/openapi.json").json()
    answer = server.post("/v1/completions", {"prompt": 7})
    operation = described["paths"]["/v1/completions"]["post"]
    content = operation["responses"][str(answer.status_code)]["content"]
    schema = content["application/json"]["schema"]
    jsonschema.validate(answer.json(), {**schema, "components": described["components"]})


def test_the_page_for_people_names_every_route_and_runs_no_script(server):
    answer = server.get("/docs")
    assert answer.headers["content-type"].startswith("text/html")
    assert "<script" not in answer.text
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    for path in server.get("/openapi.json").json()["paths"]:
        assert f"<code>{path}</code>" in answer.text


def test_routes_that_need_a_key_say_so(launch):
    keyed = launch("--api-key", "secret")
    known = {"authorization": "Bearer secret"}
    described = httpx.get(keyed.url + "/openapi.json", headers=known).json()["paths"]
    assert described["/v1/completions"]["post"]["security"] == [{"key": []}]
    for path, methods in described.items():
        for method, operation in methods.items():
            if "{" not in path:
                refused = httpx.request(method, keyed.url + path).status_code == 401
                assert refused == ("security" in operation), path
