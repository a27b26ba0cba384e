"""The packed plan: what the host writes is what the device reads."""

from typing import Any

import jax
import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from octavo.engine.plan import (
    MOVES,
    Admission,
    Chunk,
    Draft,
    Packer,
    chunk_segment,
    pieces,
    plan_size,
    unpack,
    upload_capacity,
)
from octavo.engine.state import BIAS, STOP_IDS, Dims, PageGroup

DIMS = Dims(
    slots=40,  # stops take more than one word
    page_size=4,
    max_len=64,
    vocab=128,
    groups=(PageGroup(0, 90), PageGroup(12, 50)),
    controls=8,
    max_chunk=32,
)
slots, words = st.integers(0, DIMS.slots - 1), st.integers(-(2**31), 2**31 - 1)
ids = st.integers(1, 49)
chunks = st.builds(Chunk, slots, st.integers(0, 60), st.integers(1, 32), st.booleans())
windows = st.tuples(st.integers(0, 1), slots, st.integers(1, 15))
shared = st.tuples(st.integers(0, 8), st.lists(ids, max_size=4))


@st.composite
def admissions(draw: Any) -> Admission:
    return Admission(
        slot=draw(slots),
        length=draw(st.integers(0, 60)),
        prompt_len=draw(st.integers(1, 63)),
        limit=draw(st.integers(2, 64)),
        min_tokens=draw(st.integers(0, 9)),
        seed=draw(st.integers(0, 2**64 - 1)),
        stop_ids=draw(st.lists(st.integers(0, 127), max_size=STOP_IDS)),
        sampling=np.array(draw(st.lists(st.floats(width=32), min_size=8, max_size=8)), np.float32),
        pages=[
            (first, np.array(pages, np.int32)) for first, pages in draw(st.tuples(shared, shared))
        ],
    )


uploads = st.tuples(
    st.integers(0, 2),
    slots,
    st.integers(0, 9),
    st.lists(words, max_size=10),
)
drafts = st.builds(
    Draft,
    stops=st.lists(slots, unique=True, max_size=40),
    moves=st.lists(st.tuples(slots, slots), max_size=MOVES),
    returned=st.tuples(st.lists(ids, max_size=20), st.lists(ids, max_size=20)).map(list),
    admissions=st.lists(admissions(), max_size=6, unique_by=lambda a: a.slot),
    windows=st.lists(windows, max_size=8, unique_by=lambda w: w[:2]),
    uploads=st.lists(uploads, max_size=6).map(
        lambda many: [(k, s, o, np.array(v, np.int32)) for k, s, o, v in many]
    ),
    chunks=st.lists(chunks, max_size=DIMS.chunks),
)
PACKER = Packer(DIMS)
device_side = jax.jit(lambda vector: (unpack(DIMS, vector), chunk_segment(DIMS, vector)))


@settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(drafts)
def test_the_device_reads_what_the_host_wrote(draft: Draft) -> None:
    plan, segment = jax.device_get(device_side(PACKER.pack(draft)))
    got = segment[: len(draft.chunks)].tolist()
    assert got == [[c.slot, c.start, c.count, c.final] for c in draft.chunks]
    assert not segment[len(draft.chunks) :].any()
    np.testing.assert_array_equal(plan.chunk, segment)
    assert np.flatnonzero(plan.stop).tolist() == sorted(draft.stops)
    moves = list(zip(plan.move_src.tolist(), plan.move_dst.tolist(), strict=True))
    assert moves == draft.moves + [(0, 0)] * (MOVES - len(draft.moves))
    for g, pages in enumerate(draft.returned):
        assert plan.returned[g, : plan.returned_count[g]].tolist() == pages
    window = np.zeros((2, DIMS.slots), np.int32)
    for g, slot, first in draft.windows:
        window[g, slot] = first
    np.testing.assert_array_equal(plan.window_first, window)
    _uploads_agree(plan, draft)
    _admissions_agree(plan, draft)


def _uploads_agree(plan: Any, draft: Draft) -> None:
    at = 0
    for piece, (kind, slot, offset, values) in zip(plan.piece, draft.uploads, strict=False):
        assert piece.tolist() == [slot, offset, len(values), kind]
        np.testing.assert_array_equal(plan.upload[at : at + len(values)], values)
        at += len(values)
    assert not plan.piece[len(draft.uploads) :].any()


def _admissions_agree(plan: Any, draft: Draft) -> None:
    used = [0, 0]
    for i, a in enumerate(draft.admissions):
        low, high = plan.admission[i, 5:7].astype(np.uint32).tolist()
        assert low | high << 32 == a.seed
        want = [a.slot, a.length, a.prompt_len, a.limit, a.min_tokens]
        assert plan.admission[i, :5].tolist() == want
        assert plan.stop_ids[i].tolist() == a.stop_ids + [-1] * (STOP_IDS - len(a.stop_ids))
        np.testing.assert_array_equal(plan.sampling[i], a.sampling)
        for g, (first, pages) in enumerate(a.pages):
            assert plan.first[i, g] == first and plan.held[i, g] == first + len(pages)
            got = plan.shared[g, used[g] : used[g] + len(pages)]
            np.testing.assert_array_equal(got, pages)
            used[g] += len(pages)
    assert (plan.admission[len(draft.admissions) :, 0] == -1).all()


def test_a_packed_vector_is_never_used_again() -> None:
    one, two = PACKER.pack(Draft(stops=[3])), PACKER.pack(Draft(stops=[4]))
    assert not np.shares_memory(one, two)
    kept = one.copy()
    PACKER.pack(Draft(stops=[5], chunks=[Chunk(1, 0, 4, True)]))
    np.testing.assert_array_equal(one, kept)
    assert one.shape == (plan_size(DIMS),) and one.dtype == np.int32


def test_an_empty_plan_changes_nothing() -> None:
    plan, segment = jax.device_get(device_side(PACKER.pack(Draft())))
    assert not Draft().edits() and not Draft(chunks=[Chunk(0, 0, 1, False)]).edits()
    assert not plan.stop.any() and not plan.returned_count.any() and not segment.any()
    assert (plan.admission[:, 0] == -1).all()


def test_a_plan_has_room_for_any_one_request() -> None:
    assert upload_capacity(DIMS) >= DIMS.max_len - 1 + 2 * BIAS
    assert DIMS.returns >= DIMS.pages_per_slot
    assert pieces(DIMS) >= 3 * DIMS.chunks
