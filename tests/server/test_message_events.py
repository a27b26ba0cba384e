"""Thought, text and calls of tools, as Anthropic's client reads them back."""

from typing import Any

import pytest
from anthropic import Anthropic

from octavo.server.collect import Delta, ToolCall
from octavo.server.message_events import Blocks
from octavo.server.protocol.messages import MessagesUsage
from tests.server.replay import replayed

pytestmark = pytest.mark.filterwarnings("error::UserWarning", "error::DeprecationWarning")
SAID = [
    Delta(0, 0, reasoning="Let me "),
    Delta(0, 0, reasoning="think."),
    Delta(0, 0, text="I shall "),
    Delta(0, 0, text="ask.\n", tool_calls=[ToolCall(0, "call_a", "weather", '{"city": ')]),
    Delta(0, 0, tool_calls=[ToolCall(0, arguments='"Ulm"}'), ToolCall(1, "call_b", "time", "")]),
    Delta(0, 0, tool_calls=[ToolCall(1, arguments="{}")], finish_reason="tool_calls"),
]


def streamed(said: list[Delta]) -> bytes:
    blocks = Blocks("msg_1", "tiny")
    frames = [blocks.start(MessagesUsage(7, 0, 3))] + [blocks.add(delta) for delta in said]
    return b"".join([*frames, blocks.end(), blocks.stop(MessagesUsage(7, 12, 3))])


def read_back(said: list[Delta]) -> Any:
    with replayed(streamed(said)) as url:
        client: Any = Anthropic(base_url=url, api_key="none", max_retries=0)
        body = {"model": "tiny", "max_tokens": 9, "messages": [{"role": "user", "content": "?"}]}
        with client.messages.stream(**body) as stream:
            kinds = [event.type for event in stream]
            return stream.get_final_message(), kinds


def test_the_client_puts_thought_text_and_calls_together():
    message, kinds = read_back(SAID)
    thought, text, weather, clock = message.content
    assert (thought.type, thought.thinking) == ("thinking", "Let me think.")
    assert thought.signature
    assert (text.type, text.text) == ("text", "I shall ask.\n")
    assert (weather.id, weather.name, weather.input) == ("call_a", "weather", {"city": "Ulm"})
    assert (clock.id, clock.name, clock.input) == ("call_b", "time", {})
    assert message.stop_reason == "tool_use"
    assert (message.usage.input_tokens, message.usage.output_tokens) == (7, 12)
    assert message.usage.cache_read_input_tokens == 3
    assert kinds.count("content_block_start") == kinds.count("content_block_stop") == 4


def test_the_whole_message_is_the_streamed_one():
    message, _ = read_back(SAID)
    blocks, whole = Blocks("msg_1", "tiny"), Delta(0, 0)
    for delta in SAID:
        whole.extend(delta)
    blocks.add(whole)
    blocks.end()
    made = blocks.message(MessagesUsage(7, 12, 3))
    assert made.content == [block.model_dump(exclude_none=True) for block in message.content]
    assert made.stop_reason == message.stop_reason


@pytest.mark.parametrize(
    ("finish", "stop", "reason", "sequence"),
    [
        ("stop", None, "end_turn", None),
        ("stop", "END", "stop_sequence", "END"),
        ("stop", 7, "end_turn", None),
        ("length", None, "max_tokens", None),
    ],
)
def test_each_end_has_its_reason(finish, stop, reason, sequence):
    message, _ = read_back([Delta(0, 0, text="a", finish_reason=finish, stop_reason=stop)])
    assert (message.stop_reason, message.stop_sequence) == (reason, sequence)


def test_a_message_that_says_nothing_has_one_empty_text():
    message, _ = read_back([Delta(0, 0, finish_reason="stop")])
    assert [block.text for block in message.content] == [""]


def test_a_call_that_was_cut_off_is_still_a_call():
    blocks = Blocks("msg_1", "tiny")
    call = ToolCall(0, "call_a", "weather", '{"city": "U')
    blocks.add(Delta(0, 0, tool_calls=[call], finish_reason="length"))
    blocks.end()
    assert blocks.content[0]["input"] == {"_raw": '{"city": "U'}
    assert blocks.stop_reason == "max_tokens"
