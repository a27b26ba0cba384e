"""One message of many tokens becomes each request's output."""

import numpy as np
import pytest

from octavo.engine.messages import Finish, Logprobs, Output, Start
from octavo.engine.sampling_params import (
    RepetitionDetectionParams,
    RequestOutputKind,
    SamplingParams,
)
from octavo.engine.text.processor import OutputProcessor, repeats

CUMULATIVE, DELTA, FINAL = RequestOutputKind


def message(*rows, **more):
    """Rows of (handle, token)."""
    handles = np.array([handle for handle, _ in rows], "<u4").tobytes()
    tokens = np.array([token for _, token in rows], "<i4").tobytes()
    return Output(handles=handles, tokens=tokens, **more)


def run(processor, handle, ids, finish=None):
    """One token per message; the finish comes with the last."""
    outputs, aborts = [], []
    for i, token in enumerate(ids):
        finished = [finish] if finish and i == len(ids) - 1 else []
        out, ended = processor.process(message((handle, token), finished=finished))
        outputs += out
        aborts += ended
    return outputs, aborts


def added(tokenizer, n=1, **params):
    processor = OutputProcessor(tokenizer)
    processor.add("r", 7, n, "prompt", [1, 2, 3], SamplingParams(max_tokens=100, **params))
    return processor


def test_cumulative_outputs_grow_and_deltas_add_up(smollm2):
    ids = smollm2.encode("Paris is 🦙 nice")
    whole, _ = run(added(smollm2), 7, ids, Finish(7, "length"))
    assert [len(o.outputs[0].token_ids) for o in whole] == list(range(1, len(ids) + 1))
    last = whole[-1]
    assert (last.outputs[0].text, last.outputs[0].finish_reason) == ("Paris is 🦙 nice", "length")
    assert last.finished and not whole[0].finished
    assert (last.prompt, last.prompt_token_ids, last.request_id) == ("prompt", [1, 2, 3], "r")
    parts, _ = run(added(smollm2, output_kind=DELTA), 7, ids, Finish(7, "length"))
    assert "".join(o.outputs[0].text for o in parts) == "Paris is 🦙 nice"
    assert sum((o.outputs[0].token_ids for o in parts), []) == ids


def test_final_only_tells_everything_once(smollm2):
    ids = smollm2.encode("Paris is nice")
    processor = added(smollm2, output_kind=FINAL)
    outputs, _ = run(processor, 7, ids, Finish(7, "length"))
    assert [o.outputs[0].text for o in outputs] == ["Paris is nice"]
    assert len(processor) == 0


def test_an_interval_tells_the_first_token_and_the_last_at_once(smollm2):
    ids = smollm2.encode("a b c d e f g h")[:8]
    outputs, _ = run(
        added(smollm2, output_kind=DELTA, stream_interval=3), 7, ids, Finish(7, "length")
    )
    assert [len(o.outputs[0].token_ids) for o in outputs] == [1, 3, 3, 1]


def test_a_stop_string_ends_the_sequence_here_and_the_engine_is_told(smollm2):
    ids = smollm2.encode("one two END three")
    for kind in RequestOutputKind:
        processor = added(smollm2, stop=["END", "zzz"], output_kind=kind)
        outputs, aborts = run(processor, 7, ids)
        last = outputs[-1].outputs[0]
        assert aborts == [7]
        assert (last.finish_reason, last.stop_reason) == ("stop", "END")
        text = "".join(o.outputs[0].text for o in outputs) if kind is DELTA else last.text
        assert text == "one two "
        assert len(processor) == 0  # the tokens after it were ignored


def test_tokens_of_one_message_past_a_stop_string_never_were(smollm2):
    ids = smollm2.encode("one END two three")
    processor = added(smollm2, stop="END")
    outputs, _ = processor.process(message(*((7, token) for token in ids)))
    assert smollm2.decode(outputs[0].outputs[0].token_ids) == "one END"


def test_the_end_token_is_kept_as_id_and_not_shown(smollm2):
    comma = smollm2.encode(",")[0]
    ids = [*smollm2.encode("yes"), comma]
    finish = Finish(7, "stop", stop_token=comma)
    for kind in (CUMULATIVE, FINAL):
        outputs, aborts = run(added(smollm2, output_kind=kind), 7, ids, finish)
        last = outputs[-1].outputs[0]
        assert (last.text, last.token_ids, last.stop_reason) == ("yes", ids, comma)
        assert aborts == []
    shown, _ = run(added(smollm2, include_stop_str_in_output=True), 7, ids, finish)
    assert shown[-1].outputs[0].text == "yes,"
    ended, _ = run(added(smollm2), 7, [*ids, 2], Finish(7, "stop"))
    assert (ended[-1].outputs[0].text, ended[-1].outputs[0].stop_reason) == ("yes,", None)


def test_min_tokens_let_a_stop_string_pass(smollm2):
    ids = smollm2.encode("a b a b a b")
    outputs, _ = run(added(smollm2, stop=["b"], min_tokens=3), 7, ids)
    assert outputs[-1].outputs[0].text == "a b a "


def test_n_sequences_are_one_request(smollm2):
    a, b = smollm2.encode("yes")[0], smollm2.encode("no")[0]
    processor = added(smollm2, n=2, output_kind=FINAL)
    outputs, _ = processor.process(message((8, b), (7, a), finished=[Finish(8, "length")]))
    assert outputs == []
    outputs, _ = processor.process(message((7, a), finished=[Finish(7, "length")]))
    assert [(o.index, o.text) for o in outputs[0].outputs] == [(0, "yesyes"), (1, "no")]
    assert outputs[0].finished
    deltas = added(smollm2, n=2, output_kind=DELTA)
    outputs, _ = deltas.process(message((8, b)))
    assert [o.index for o in outputs[0].outputs] == [1]
    assert not outputs[0].finished


def test_logprobs_say_token_rank_and_text(smollm2):
    processor = added(smollm2, logprobs=2, prompt_logprobs=0)
    a, b = smollm2.encode("yes")[0], smollm2.encode("no")[0]

    def entry(position, tokens, values, rank):
        return Logprobs(
            7, position, np.array(tokens, "<i4").tobytes(), np.array(values, "<f4").tobytes(), rank
        )

    outputs, _ = processor.process(
        message(
            (7, a), logprobs=[entry(1, [2], [-4.0], 9), entry(3, [a, b, a], [-2.0, -0.5, -2.0], 2)]
        )
    )
    out = outputs[0]
    assert out.prompt_logprobs[0] is None
    assert (out.prompt_logprobs[1][2].logprob, out.prompt_logprobs[1][2].rank) == (-4.0, 9)
    first = out.outputs[0]
    assert first.cumulative_logprob == -2.0
    assert list(first.logprobs[0]) == [a, b]
    assert (first.logprobs[0][a].rank, first.logprobs[0][b].rank) == (2, 1)
    assert first.logprobs[0][a].decoded_token == "yes"


def test_repetition_is_an_end_of_its_own(smollm2):
    rule = RepetitionDetectionParams(max_pattern_size=3, min_count=3)
    outputs, aborts = run(added(smollm2, repetition_detection=rule), 7, [9, 5, 6, 5, 6, 5, 6, 5])
    assert outputs[-1].outputs[0].finish_reason == "repetition"
    assert len(outputs[-1].outputs[0].token_ids) == 7
    assert aborts == [7]
    assert not repeats([1, 2, 3, 1, 2, 3], rule)
    assert repeats([1, 2, 3] * 3, rule)


def test_an_error_of_the_engine_reaches_its_request(smollm2):
    processor = added(smollm2)
    finish = Finish(7, "error", message="it broke", status=503)
    outputs, aborts = processor.process(message(finished=[finish]))
    assert (outputs[0].error, outputs[0].status, outputs[0].finished) == ("it broke", 503, True)
    assert outputs[0].outputs[0].finish_reason == "error"
    assert aborts == []


def test_when_the_engine_dies_every_request_ends(smollm2):
    processor = added(smollm2, n=2)
    outputs = processor.fail_all("the engine is gone", 503)
    assert [(o.request_id, o.finished, o.error) for o in outputs] == [
        ("r", True, "the engine is gone")
    ]
    assert len(processor) == 0


def test_an_aborted_request_is_forgotten(smollm2):
    processor = added(smollm2, n=2)
    processor.process(message((7, 5), finished=[Finish(7, "length")]))
    assert processor.abort("r") == [8]
    assert processor.abort("r") == []
    assert processor.process(message((8, 5), finished=[Finish(8, "abort")])) == ([], [])


def test_times_and_cached_tokens_are_told(smollm2):
    processor = OutputProcessor(smollm2)
    processor.add("r", 7, 1, None, [1], SamplingParams(), arrival=100.0)
    outputs, _ = processor.process(message((7, 5), starts=[Start(7, 16, 0.5)]), now=101.0)
    out = outputs[0]
    assert out.num_cached_tokens == 16
    assert (out.metrics.scheduled_time, out.metrics.first_token_time) == (100.5, 101.0)
    assert out.metrics.time_to_first_token == 1.0


@pytest.mark.parametrize("tokenizer", [None, "smollm2"])
def test_text_is_left_out_where_nobody_wants_it(tokenizer, request):
    tokenizer = request.getfixturevalue(tokenizer) if tokenizer else None
    outputs, _ = run(added(tokenizer, detokenize=False), 7, [5, 6], Finish(7, "length"))
    assert (outputs[-1].outputs[0].text, outputs[-1].outputs[0].token_ids) == ("", [5, 6])
