"""/v1/responses against an engine that repeats the prompt."""

import time
from typing import Any

import openai
import pytest

from tests.server.conftest import Server

pytestmark = pytest.mark.filterwarnings("error::UserWarning", "error::DeprecationWarning")
RENDERED = "<user>hello<assistant>"
ABORTED = 'vllm:request_success_total{engine="0",finished_reason="abort"'
WEATHER = {"type": "function", "name": "weather", "parameters": {}, "strict": False}


def client_of(server: Server) -> Any:
    """Untyped: what its types refuse is sent on purpose."""
    return server.openai()


def body_of(caught: Any) -> Any:
    return caught.value.body


def ask(server: Server, **fields: Any) -> Any:
    """Its client refuses some fields itself; these go as they are."""
    fields = {"max_output_tokens": 22, **fields}
    return client_of(server).responses.create(model="tiny", input="hello", extra_body=fields)


def test_a_response_has_items_usage_and_a_status(server):
    response = ask(server, metadata={"a": "b"}, user="me", prompt_cache_key="k")
    assert response.output_text == RENDERED
    assert response.status == "incomplete"
    assert response.incomplete_details.reason == "max_output_tokens"
    assert (response.usage.input_tokens, response.usage.output_tokens) == (22, 22)
    assert response.usage.total_tokens == 44
    assert (response.metadata, response.user) == ({"a": "b"}, "me")
    assert response.prompt_cache_key == "k" and response.max_output_tokens == 22
    assert response._request_id == response.id


def test_a_response_that_ends_by_itself_is_completed(server):
    response = ask(server, stop=["assist"])
    assert (response.output_text, response.status) == ("<user>hello<", "completed")
    assert response.completed_at >= response.created_at


def test_a_stream_is_the_same_response(server):
    client = client_of(server)
    body = {"model": "tiny", "input": "hello"}
    with client.responses.stream(**body, extra_body={"stop": ["assist"]}) as stream:
        text = "".join(e.delta for e in stream if e.type == "response.output_text.delta")
        final = stream.get_final_response()
    assert final.output_text == text == "<user>hello<"
    assert client.responses.retrieve(final.id).output_text == text


def test_the_events_have_names_and_none_is_done(server):
    body = {"model": "tiny", "input": "hello", "max_output_tokens": 2, "stream": True}
    text = server.post("/v1/responses", body).text
    names = [line[7:] for line in text.splitlines() if line.startswith("event: response.")]
    assert names[:2] == ["response.created", "response.in_progress"]
    assert names[-1] == "response.incomplete" and "[DONE]" not in text


def test_log_probabilities_come_with_the_text(server):
    wanted = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    response = ask(server, **wanted, max_output_tokens=4)
    rows = response.output[0].content[0].logprobs
    assert "".join(row.token for row in rows) == response.output_text
    assert [len(row.top_logprobs) for row in rows] == [2] * 4
    streamed = []
    for event in client_of(server).responses.create(
        model="tiny", input="hello", max_output_tokens=4, stream=True, extra_body=wanted
    ):
        if event.type == "response.output_text.delta":
            streamed += [row.token for row in event.logprobs]
    assert streamed == [row.token for row in rows]


def test_a_chain_is_the_same_conversation_as_its_items_sent_whole(server):
    client = client_of(server)
    first = ask(server, instructions="be brief")
    said = [{"role": "user", "content": "hello"}, *first.output, {"role": "user", "content": "so"}]
    body = {"model": "tiny", "max_output_tokens": 120}
    chained = client.responses.create(**body, input="so", previous_response_id=first.id)
    whole = client.responses.create(**body, input=said)
    assert chained.output_text == whole.output_text
    # Instructions are of one response: they are not carried over.
    prompt = f"<user>hello<assistant>{first.output_text}<user>so<assistant>"
    assert chained.output_text.startswith(prompt)
    assert chained.usage.input_tokens == whole.usage.input_tokens
    items = client.responses.input_items.list(chained.id, order="asc").data
    assert [item.role for item in items] == ["user", "assistant", "user"]


def test_input_items_come_in_pages(server):
    client = client_of(server)
    said = [{"role": "user", "content": str(i)} for i in range(5)]
    response = client.responses.create(model="tiny", input=said, max_output_tokens=1)
    pages = client.responses.input_items.list(response.id, order="asc", limit=2)
    assert [item.content[0].text for item in pages] == list("01234")
    newest = client.responses.input_items.list(response.id, limit=1).data
    assert newest[0].content[0].text == "4"


def test_every_kind_of_item_is_taken(server):
    said = [
        {"role": "developer", "content": "brief"},
        {"role": "user", "content": [{"type": "input_text", "text": "a"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": []},
        {"role": "assistant", "content": [{"type": "output_text", "text": "b"}]},
        {"type": "function_call", "call_id": "c", "name": "weather", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "sunny"},
    ]
    response = client_of(server).responses.create(
        model="tiny", input=said, instructions="kind", max_output_tokens=180
    )
    call = '<tool_call>\n{"name": "weather", "arguments": {}}\n</tool_call>'
    result = "<user><tool_response>\nsunny\n</tool_response>"  # this template knows no tools
    assert response.output_text.startswith(
        f"<system>kind\nbrief<user>a<assistant>b\n{call}{result}<assistant>"
    )


def test_what_is_not_stored_is_not_found(server):
    client = client_of(server)
    response = ask(server, store=False)
    for call in (client.responses.retrieve, client.responses.delete, client.responses.cancel):
        with pytest.raises(openai.NotFoundError):
            call(response.id)
    with pytest.raises(openai.BadRequestError) as caught:
        ask(server, previous_response_id=response.id)
    assert body_of(caught)["param"] == "previous_response_id"


def test_a_deleted_response_is_no_more(server):
    client = client_of(server)
    response = ask(server)
    client.responses.delete(response.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(response.id)


def test_a_response_is_named_by_its_request_once(server):
    assert ask(server, request_id="mine-1").id == "resp_mine-1"
    with pytest.raises(openai.BadRequestError, match="exists already"):
        ask(server, request_id="mine-1")


def test_work_in_the_background_can_be_polled(server):
    client = client_of(server)
    response = ask(server, background=True)
    assert response.status == "queued" and response.output == []
    server.until(
        lambda: client.responses.retrieve(response.id).status == "incomplete", "it never ended"
    )
    assert client.responses.retrieve(response.id).output_text == RENDERED


def test_work_in_the_background_can_be_followed_from_any_event(server):
    client = client_of(server)
    body = {"model": "tiny", "input": "hello", "background": True, "max_output_tokens": 22}
    events = list(client.responses.create(**body, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    name = events[0].response.id
    again = list(client.responses.retrieve(name, stream=True, starting_after=10))
    assert [e.model_dump() for e in again] == [e.model_dump() for e in events[11:]]
    assert again[-1].type == "response.incomplete"


def test_a_response_without_kept_events_cannot_be_followed(server):
    with pytest.raises(openai.BadRequestError, match="background"):
        client_of(server).responses.retrieve(ask(server).id, stream=True)


@pytest.mark.parametrize("processes", [1, 2])
def test_work_in_the_background_can_be_cancelled(launch, processes):
    slow = launch("--api-server-count", str(processes), step=0.02)
    for _ in range(3 * processes):  # some reach the other process
        client = client_of(slow)
        response = ask(slow, background=True, max_output_tokens=480)
        began = time.monotonic()
        cancelled = client.responses.cancel(response.id)
        assert cancelled.status == "cancelled" and time.monotonic() - began < 4
        assert client.responses.retrieve(response.id).status == "cancelled"
    slow.until(lambda: slow.metric("vllm:num_requests_running") == 0, "the work goes on")


def test_only_work_in_the_background_can_be_cancelled(server):
    with pytest.raises(openai.BadRequestError, match="background"):
        client_of(server).responses.cancel(ask(server).id)


def test_several_processes_know_each_others_responses(launch):
    both = launch("--api-server-count", "2")
    names = [ask(both).id for _ in range(4)]
    for name in names * 3:  # each over a connection of its own
        assert both.get(f"/v1/responses/{name}").status_code == 200


def test_the_store_can_be_switched_off(launch):
    without = launch("--max-stored-responses", "0")
    response = ask(without)
    assert without.get(f"/v1/responses/{response.id}").status_code == 404
    with pytest.raises(openai.BadRequestError, match="keeps responses"):
        ask(without, background=True)


def test_truncation_drops_the_oldest_turns(server):
    said = [{"role": "user", "content": f"{i}" * 100} for i in range(8)]
    body = {"model": "tiny", "input": said, "instructions": "s", "max_output_tokens": 20}
    with pytest.raises(openai.BadRequestError, match="the context is 512"):
        client_of(server).responses.create(**body)
    response = client_of(server).responses.create(**body, truncation="auto")
    assert response.output_text.startswith("<system>s<user>4444")
    assert response.usage.input_tokens <= 512 - 20


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"input": []}, "input"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0]"),
        ({"input": [{"type": "computer_call"}]}, "input[0].type"),
        ({"input": [{"role": "robot", "content": "a"}]}, "input[0].role"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input[0].content[0].type",
        ),
        ({"input": [{"type": "function_call_output", "output": "a"}]}, "input[0].call_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"previous_response_id": "resp_none"}, "resp_none"),
        ({"max_tokens": 7}, "max_output_tokens"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [WEATHER], "tool_choice": {"type": "mcp"}}, "tool_choice"),
        ({"include": ["everything"]}, "include"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"truncation": "some"}, "truncation"),
        ({"background": True, "store": False}, "background"),
        ({"n": 2}, "n"),
        ({"temperature": -1}, "temperature"),
    ],
)
def test_what_cannot_be_served_is_named(server, fields, named):
    with pytest.raises(openai.BadRequestError, match="400") as caught:
        ask(server, **fields)
    assert f"`{named}`" in body_of(caught)["message"]


def test_an_engine_error_is_a_failed_response(server):
    with pytest.raises(openai.InternalServerError, match="it was told to"):
        ask(server, cache_salt="fail")
    fields = {"max_output_tokens": 9, "cache_salt": "fail"}
    events = list(
        client_of(server).responses.create(
            model="tiny", input="hello", stream=True, extra_body=fields
        )
    )
    assert events[-1].type == "response.failed"
    assert events[-1].response.error.message == "it was told to"
    assert any(event.type == "response.output_text.delta" for event in events)


def test_a_client_that_leaves_takes_its_work_along(server):
    before = server.metric(ABORTED)
    stream = client_of(server).responses.create(model="tiny", input="hello", stream=True)
    next(iter(stream))
    stream.close()
    server.until(lambda: server.metric(ABORTED) == before + 1, "nobody aborted")
