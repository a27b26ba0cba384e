"""From what a request asks for to a grammar: each kind accepts and rejects what it should."""

import json
from typing import Any

import pytest

from octavo.engine.grammar.guide import compile_grammar
from octavo.engine.grammar.source import grammar_text
from octavo.engine.grammar.vocabulary import Vocabulary
from octavo.engine.sampling_params import ParameterError, StructuredOutputsParams
from octavo.engine.text.tokenizer import Tokenizer, load_tokenizer
from tests.e2e.golden import need

POINT = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
BYTES = Vocabulary(257, [256], [256], tokens=[*(bytes([i]) for i in range(256)), b"<end>"]).open()


def takes(text: str, **form: Any) -> bool:
    """Whether `text`, whole, is allowed."""
    matcher = compile_grammar(BYTES, grammar_text(StructuredOutputsParams(**form)))
    return bool(matcher.consume_tokens(list(text.encode())) and matcher.is_accepting())


def tag(form: Any) -> dict[str, str]:
    return {"structural_tag": json.dumps({"type": "structural_tag", "format": form})}


CALL = {"begin": "<f=a>", "content": {"type": "json_schema", "json_schema": POINT}, "end": "</f>"}
TRIGGERED = {"type": "triggered_tags", "triggers": ["<f="], "tags": [CALL]}
OLDER = {
    "type": "structural_tag",
    "structures": [{"begin": "<f=a>", "schema": POINT, "end": "</f>"}],
    "triggers": ["<f="],
}
THOUGHT = {"type": "tag", "begin": "<t>", "content": {"type": "any_text"}, "end": "</t>"}
AB = [{"type": "const_string", "value": "A"}, {"type": "const_string", "value": "B"}]


@pytest.mark.parametrize(
    ("form", "good", "bad"),
    [
        ({"json": POINT}, '{"x": 1, "y": []}', '{"x": "1"}'),
        ({"json": json.dumps(POINT)}, '{\n  "x" : 1}', "{}"),
        ({"json": POINT, "disable_any_whitespace": True}, '{"x":1}', '{"x": 1}'),
        ({"json": POINT, "whitespace_pattern": "[ ]?"}, '{ "x": 1}', '{  "x": 1}'),
        ({"json": POINT, "disable_additional_properties": True}, '{"x": 1}', '{"x": 1, "y": 1}'),
        ({"json": {"maximum": 10**30, "type": "integer"}}, "5", "5.5"),
        ({"json": "true"}, "[null]", "[nul]"),
        ({"json_object": True}, '{"a": {"b": 1}}', "[1]"),
        ({"regex": r"\d{3}-[a-f]+"}, "123-abc", "12-abc"),
        ({"regex": r"\d/\w+\n[^/]"}, "1/a_\nb", "\u0661/a\nb"),
        ({"regex": 'a\n"b"'}, 'a\n"b"', "a"),
        ({"regex": "\u00e9|[\u4e00-\u4fff]"}, "\u4e2d", "e"),
        ({"choice": ["red", 'gr"een\n']}, 'gr"een\n', "gr"),
        ({"grammar": 'start: "a"+ B\nB: /[0-9]/'}, "aa7", "aa"),
        ({"grammar": 'root ::= "x" tail\ntail ::= [0-9]+ | "y"'}, "x42", "x"),
        ({"structural_tag": json.dumps(OLDER)}, 'so <f=a>{"x":1}</f> and', 'so <f=b>{"x":1}</f>'),
        (tag(TRIGGERED), 'a<f=a>{"x":1}</f>b<f=a>{"x":2}</f>', '<f=a>{"x":"1"}</f>'),
        (tag(TRIGGERED | {"at_least_one": True}), '<f=a>{"x":1}</f>', "no call"),
        (tag(TRIGGERED | {"stop_after_first": True}), 'x<f=a>{"x":1}</f>', '<f=a>{"x"}</f>'),
        (tag(THOUGHT), "<t>any < thing</t>", "<t>any</t>more"),
        (tag({"type": "sequence", "elements": [THOUGHT, AB[0]]}), "<t>x</t>A", "<t>x</t>"),
        (tag({"type": "or", "elements": AB}), "B", "AB"),
        (tag({"type": "regex", "pattern": "a/b+"}), "a/bb", "a/"),
        (tag({"type": "grammar", "grammar": 'start: "q" | "r"'}), "r", "qr"),
        (
            tag({"type": "tags_with_separator", "tags": [CALL], "separator": ";"}),
            '<f=a>{"x":1}</f>;<f=a>{"x":2}</f>',
            '<f=a>{"x":1}</f>;',
        ),
    ],
    ids=lambda value: str(value)[:60],
)
def test_each_kind_takes_what_fits_and_nothing_else(
    form: dict[str, Any], good: str, bad: str
) -> None:
    assert takes(good, **form)
    assert not takes(bad, **form)


@pytest.mark.parametrize(
    ("form", "says"),
    [
        ({"json": "["}, "json is not JSON"),
        ({"json": "5"}, "json must be a JSON schema"),
        ({"choice": ["a", ""]}, "not empty"),
        ({"regex": "a" * 2_000_000}, "takes at most 1,048,576 characters, got 2,000,000"),
        ({"grammar": "root ::= ("}, "grammar cannot be read"),
        (tag({"type": "frog"}), "has no format `frog`"),
        (tag({"type": "whole"}), "has no format `whole`"),
        (tag({"type": "sequence", "elements": []}), "a list that is not empty"),
        (tag(TRIGGERED | {"triggers": ["<g"]}), "no trigger that `begin` '<f=a>' starts with"),
        ({"structural_tag": "[]"}, "must be a JSON object"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_cannot_be_read_is_named(form: dict[str, Any], says: str) -> None:
    with pytest.raises(ParameterError) as error:
        grammar_text(StructuredOutputsParams(**form))
    assert says in str(error.value) and error.value.parameter == "structured_outputs"


@pytest.mark.parametrize("model", ["smollm2-135m", "gemma3-270m"])
def test_llguidance_reads_the_tokens_as_the_detokenizer_does(model: str) -> None:
    need(model)
    tokenizer = load_tokenizer(model)
    vocabulary = Vocabulary.of(tokenizer, tokenizer.vocab_size + 50, [1])
    opened = vocabulary.open()
    assert vocabulary.file and opened.vocab_size == tokenizer.vocab_size + 50
    ids = [i for i in range(0, tokenizer.vocab_size, 7) if i not in tokenizer.special_ids]
    wrong = [i for i in ids if opened.decode_bytes([i]) != tokenizer.token_bytes(i)]
    assert wrong == []


def test_a_model_that_names_no_end_is_refused() -> None:
    need("smollm2-135m")
    tokenizer = load_tokenizer("smollm2-135m")
    tokenizer.eos_id = None
    with pytest.raises(ParameterError, match="end-of-sequence"):
        Vocabulary.of(tokenizer, 49152, [])
    with pytest.raises(ParameterError, match="needs a tokenizer"):
        Vocabulary.of(None, 49152, [2])


def test_a_tokenizer_that_llguidance_cannot_read_is_given_as_bytes() -> None:
    need("smollm2-135m")
    tokenizer: Tokenizer = load_tokenizer("smollm2-135m")
    native = Vocabulary.of(tokenizer, 49152, [2])
    tokenizer.pieces = None
    spelled = Vocabulary.of(tokenizer, 49152, [2])
    assert spelled.tokens and not spelled.file
    text = '{"name": "x"}'
    for vocabulary in (native, spelled):
        opened = vocabulary.open()
        matcher = compile_grammar(opened, grammar_text(StructuredOutputsParams(json_object=True)))
        assert matcher.consume_tokens(tokenizer.encode(text)) and matcher.is_accepting()
