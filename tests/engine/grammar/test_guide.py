"""Masks against brute force, and what a guide does with its sequence's tokens."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.engine.grammar.guide import Filler, Guide, compile_grammar
from tests.engine.grammar.words import (
    VOCABULARY,
    allowed,
    brute_force,
    text_of,
    words_grammar,
)
from tests.engine.tiny import EOS, VOCAB

TOKENIZER = VOCABULARY.open()
FILLER = Filler(VOCAB)
WORDS = st.sets(st.text("abc", min_size=1, max_size=6), min_size=1, max_size=8)


def guide(words: set[str] | list[str], after: list[int] | None = None) -> Guide:
    return Guide(compile_grammar(TOKENIZER, words_grammar(sorted(words))), EOS, after or ())


@settings(max_examples=60, deadline=None)
@given(languages=st.lists(WORDS, min_size=1, max_size=5), draw=st.data())
def test_every_row_of_every_step_is_what_brute_force_gives(
    languages: list[set[str]], draw: st.DataObject
) -> None:
    guides = [guide(words) for words in languages]
    outputs: list[list[int]] = [[] for _ in guides]
    for _ in range(7):
        for one, output in zip(guides, outputs, strict=True):
            one.advance(np.array(output, np.int32))
        masks = FILLER.fill(guides)
        for mask, words, output in zip(masks, languages, outputs, strict=True):
            want = brute_force(words, text_of(output))
            if output and output[-1] in EOS:
                want = set(EOS)
            assert allowed(mask) == want
            output.append(draw.draw(st.sampled_from(sorted(want))))


@settings(max_examples=40, deadline=None)
@given(words=WORDS, draw=st.data())
def test_a_guide_that_is_built_again_from_the_tokens_agrees(
    words: set[str], draw: st.DataObject
) -> None:
    kept = guide(words)
    output: list[int] = []
    for _ in range(5):
        kept.advance(np.array(output, np.int32))
        again = guide(words)
        again.advance(np.array(output, np.int32))
        first, second = FILLER.fill([kept, again])
        assert np.array_equal(first, second)
        output.append(draw.draw(st.sampled_from(sorted(allowed(first)))))


def test_the_grammar_begins_behind_its_marker() -> None:
    a, b = VOCABULARY.tokens.index(b"a"), VOCABULARY.tokens.index(b"b")
    one = guide(["abc"], after=[a, a, b])
    output: list[int] = []
    for token in (b, a, a, a):
        output.append(token)
        one.advance(np.array(output, np.int32))
        assert not one.begun and len(allowed(FILLER.fill([one])[0])) == VOCAB
    output += [b, a]  # two steps at once: the marker, and the grammar's first token
    one.advance(np.array(output, np.int32))
    assert one.begun
    assert allowed(FILLER.fill([one])[0]) == brute_force(["abc"], "a")


def test_a_token_that_does_not_fit_breaks_only_its_own_guide() -> None:
    good, bad = guide(["abc"]), guide(["abc"])
    bad.advance(np.array([VOCABULARY.tokens.index(b"c")], np.int32))
    masks = FILLER.fill([bad, good])
    assert bad.broken and not good.broken
    assert allowed(masks[1]) == brute_force(["abc"], "")


def test_a_stop_token_of_the_request_ends_where_an_end_may_be() -> None:
    one = guide(["ab", "abab"])
    one.ends = one.ends | {0}
    a, b = VOCABULARY.tokens.index(b"a"), VOCABULARY.tokens.index(b"b")
    one.advance(np.array([a], np.int32))
    assert 0 not in allowed(FILLER.fill([one])[0])
    one.advance(np.array([a, b], np.int32))
    assert {0, *EOS} <= allowed(FILLER.fill([one])[0])


@pytest.mark.parametrize("text", ['start: "a" b', "nonsense", '{"grammars": [{}]}'])
def test_a_wrong_grammar_is_one_line(text: str) -> None:
    with pytest.raises(ValueError) as error:
        compile_grammar(TOKENIZER, text)
    assert "\n" not in str(error.value) and str(error.value)
