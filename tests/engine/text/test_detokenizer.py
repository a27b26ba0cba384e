"""Deltas put together are the text; stop strings are found wherever they cross token borders."""

import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from octavo.engine.text.detokenizer import Detokenizer

FEW = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
TEXT = st.text(alphabet="ab \n你é🦙½", max_size=40)


def stream(tokenizer, ids, groups=1, **options):
    """Every delta, and the stop string if one was found."""
    detokenizer = Detokenizer(tokenizer, **options)
    deltas = []
    for at in range(0, len(ids), groups):
        found = detokenizer.push(ids[at : at + groups])
        deltas.append(detokenizer.take())
        if found is not None:
            return deltas, found
    found = detokenizer.end()
    return [*deltas, detokenizer.take()], found


@FEW
@given(ids=st.lists(st.integers(0, 49151), max_size=30), groups=st.integers(1, 4))
def test_deltas_of_any_tokens_are_the_full_decode(smollm2, ids, groups):
    deltas, _ = stream(smollm2, ids, groups)
    assert "".join(deltas) == smollm2.decode(ids)
    deltas, _ = stream(smollm2, ids, groups, skip_special_tokens=False)
    assert "".join(deltas) == smollm2.decode(ids, skip_special_tokens=False)


@FEW
@given(text=TEXT, groups=st.integers(1, 4))
def test_deltas_of_a_text_are_the_text_with_byte_fallback(gemma3, text, groups):
    ids = gemma3.encode(text)
    assert "".join(stream(gemma3, ids, groups)[0]) == gemma3.decode(ids) == text


@FEW
@given(words=st.lists(st.sampled_from("the quick brown fox jumps".split()), max_size=8))
def test_other_decoders_stream_the_full_decode(metaspace, words):
    ids = metaspace.encode(" ".join(words))
    assert "".join(stream(metaspace, ids)[0]) == metaspace.decode(ids)


def test_a_character_split_over_tokens_comes_whole(smollm2):
    ids = smollm2.encode("🦙")
    assert len(ids) > 1
    deltas, _ = stream(smollm2, ids)
    assert deltas == [""] * (len(ids) - 1) + ["🦙", ""]


def test_a_character_cut_short_is_one_replacement(smollm2):
    deltas, _ = stream(smollm2, smollm2.encode("a🦙")[:-1])
    assert "".join(deltas) == "a\ufffd"


@FEW
@given(text=TEXT, stops=st.lists(st.text("ab \n你", min_size=1, max_size=4), max_size=3))
def test_text_ends_before_the_first_stop_string(smollm2, text, stops):
    deltas, found = stream(smollm2, smollm2.encode(text), stop=stops)
    places = {stop: text.find(stop) for stop in stops if stop in text}
    if not places:
        assert found is None
        assert "".join(deltas) == text
        return
    assert found in places
    # The token that completes one stop string may complete another: the earlier one counts.
    assert "".join(deltas) == text[: places[found]]
    with_it, _ = stream(smollm2, smollm2.encode(text), stop=stops, include_stop=True)
    assert "".join(with_it) == text[: places[found] + len(found)]


def test_no_delta_shows_the_beginning_of_a_stop_string(smollm2):
    deltas, found = stream(smollm2, smollm2.encode("one two STOP three"), stop=["STOP"])
    assert found == "STOP"
    assert "".join(deltas) == "one two "


def test_what_was_held_back_is_released_at_the_end(smollm2):
    deltas, found = stream(smollm2, smollm2.encode("one two ST"), stop=["STOP"])
    assert found is None
    assert "".join(deltas) == "one two ST"


def test_a_stop_string_before_it_is_looked_for_is_text(smollm2):
    detokenizer = Detokenizer(smollm2, stop=["b", "xyzzy"])
    assert detokenizer.push(smollm2.encode("ab"), look_for_stops=False) is None
    assert detokenizer.push(smollm2.encode("c")) is None
    assert detokenizer.push(smollm2.encode("b")) == "b"
    assert detokenizer.text == "abc"


def test_ids_past_the_vocabulary_are_no_text(smollm2):
    assert stream(smollm2, [504, 49152, 60000])[0] == ["The", "", "", ""]


@pytest.mark.parametrize("stop", [(), ("never this",)])
def test_a_token_costs_microseconds(smollm2, stop):
    ids = smollm2.encode("The quick 🦙 brown føx, 你好世界! return x**2\n" * 40)
    best = min(_seconds(smollm2, ids, stop) for _ in range(3)) / len(ids)
    assert best < 20e-6  # it is under 1 us on an idle machine


def _seconds(tokenizer, ids, stop):
    detokenizer = Detokenizer(tokenizer, stop=stop)
    start = time.perf_counter()
    for token in ids:
        detokenizer.push((token,))
        detokenizer.take()
    return time.perf_counter() - start
