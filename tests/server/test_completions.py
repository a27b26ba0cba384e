"""Completions, the model list, tokens: as the openai package and curl see them."""

import pytest
from openai import BadRequestError

from tests.server.conftest import Server


def test_a_text_a_list_and_token_ids_are_all_prompts(server: Server) -> None:
    client = server.openai()
    one = client.completions.create(model="tiny", prompt="abc", max_tokens=4)
    assert one.choices[0].text == "abca"
    many = client.completions.create(model="tiny", prompt=["ab", "xyz"], max_tokens=4, n=2)
    assert [choice.text for choice in many.choices] == ["abab", "abab", "xyzx", "xyzx"]
    assert [choice.index for choice in many.choices] == [0, 1, 2, 3]
    ids = server.post("/tokenize", {"prompt": "abc"}).json()["tokens"]
    tokens = client.completions.create(model="tiny", prompt=ids, max_tokens=4)
    assert tokens.choices[0].text == "abca"
    lists = client.completions.create(model="tiny", prompt=[ids, ids[:1]], max_tokens=4)
    assert [choice.text for choice in lists.choices] == ["abca", "aaaa"]


def test_sixteen_tokens_is_the_default(server: Server) -> None:
    answer = server.openai().completions.create(model="tiny", prompt="abc")
    assert answer.usage is not None and answer.usage.completion_tokens == 16


def test_streams_of_several_prompts_come_together(server: Server) -> None:
    stream = server.openai().completions.create(
        model="tiny",
        prompt=["ab", "xyz"],
        max_tokens=50,
        stream=True,
        stream_options={"include_usage": True},
    )
    texts = ["", ""]
    usage = None
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [("ab" * 25), ("xyz" * 17)[:50]]
    assert usage is not None and (usage.prompt_tokens, usage.completion_tokens) == (5, 100)


def test_echo_repeats_the_prompt_with_its_log_probabilities(server: Server) -> None:
    answer = server.openai().completions.create(
        model="tiny", prompt="abc", max_tokens=2, echo=True, logprobs=1
    )
    choice = answer.choices[0]
    assert choice.text == "abcab" and choice.logprobs is not None
    assert choice.logprobs.tokens == ["a", "b", "c", "a", "b"]
    assert choice.logprobs.text_offset == [0, 1, 2, 3, 4]
    assert choice.logprobs.token_logprobs == [None, -0.5, -0.5, -0.5, -0.5]


def test_max_tokens_of_zero_with_echo_scores_the_prompt_alone(server: Server) -> None:
    body = {"prompt": "abc", "max_tokens": 0, "echo": True, "logprobs": 0}
    answer = server.post("/v1/completions", body).json()
    choice = answer["choices"][0]
    assert (choice["text"], choice["logprobs"]["tokens"]) == ("abc", ["a", "b", "c"])
    assert answer["usage"]["completion_tokens"] == 0


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "a", "max_tokens": -1}, "max_tokens"),
        ({"prompt": "a", "max_tokens": "5"}, "max_tokens"),
        ({"prompt": "a", "logprobs": 21}, "logprobs"),
        ({"prompt": "a", "best_of": 3}, "best_of"),
        ({"prompt": [1, 10**9]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({}, "prompt"),
        ({"prompt": "a", "logit_bias": {"x": 1.0}}, "logit_bias"),
        ({"prompt": "a", "allowed_token_ids": []}, "allowed_token_ids"),
    ],
)
def test_names_the_field_that_is_wrong(server: Server, body: object, param: str) -> None:
    response = server.post("/v1/completions", body)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


def test_a_body_that_is_no_json_says_where(server: Server) -> None:
    response = server.post("/v1/completions", None)
    assert response.status_code == 400
    with pytest.raises(BadRequestError):
        server.openai().completions.create(model="tiny", prompt="a", extra_body={"n": "x"})


def test_token_ids_come_back_when_asked(server: Server) -> None:
    body = {"prompt": "ab", "max_tokens": 2, "return_token_ids": True}
    choice = server.post("/v1/completions", body).json()["choices"][0]
    assert choice["token_ids"] == choice["prompt_token_ids"]


def test_tokens_and_text_turn_into_each_other(server: Server) -> None:
    tokens = server.post("/tokenize", {"prompt": "héllo", "return_token_strs": True}).json()
    assert tokens["count"] == len(tokens["tokens"]) == 6 and tokens["max_model_len"] == 512
    assert server.post("/detokenize", {"tokens": tokens["tokens"]}).json() == {"prompt": "héllo"}
    chat = {"messages": [{"role": "user", "content": "a"}]}
    ids = server.post("/tokenize", chat).json()["tokens"]
    assert server.post("/detokenize", {"tokens": ids}).json()["prompt"] == "<user>a<assistant>"


def test_the_model_is_listed_and_found(server: Server) -> None:
    client = server.openai()
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").model_dump()["max_model_len"] == 512
    assert server.get("/v1/models/other").json()["error"]["type"] == "NotFoundError"


def test_the_request_id_of_a_client_is_kept(server: Server) -> None:
    body = {"prompt": "a", "request_id": "mine-1"}
    response = server.post("/v1/completions", body)
    assert response.json()["id"] == response.headers["x-request-id"] == "cmpl-mine-1"


def test_a_path_that_is_not_there_is_a_404_in_the_same_shape(server: Server) -> None:
    response = server.get("/v1/nothing")
    assert (response.status_code, response.json()["error"]["code"]) == (404, 404)
    assert server.get("/v1/completions").status_code == 405
