"""Packing: every token of every text has its place, the oldest goes first, little is wasted."""

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from octavo.engine.packing import SEGMENTS, Batch, Job, choose, pack, shapes

KNOWN = shapes(512, 256)


def jobs(lengths: list[int], seconds: bool = False) -> list[Job]:
    """Texts whose tokens tell the text and the place in it apart."""
    return [
        Job(i, np.arange(n, dtype=np.int32) + 1000 * i, second=n // 2 if seconds else 0)
        for i, n in enumerate(lengths)
    ]


def drained(queue: list[Job], known: Any = KNOWN) -> list[Batch]:
    """Batches until nothing waits."""
    batches, left = [], list(queue)
    while left:
        batches.append(choose(left, known))
        chosen = {job.handle for job in batches[-1].jobs}
        assert left[0].handle in chosen, "the oldest waits while others run"
        left = [job for job in left if job.handle not in chosen]
    return batches


@given(st.lists(st.integers(1, 256), min_size=1, max_size=60))
def test_every_text_runs_once_within_the_bounds_of_its_shape(lengths: list[int]) -> None:
    batches = drained(jobs(lengths))
    assert sorted(job.handle for b in batches for job in b.jobs) == list(range(len(lengths)))
    for batch in batches:
        assert batch.shape in KNOWN
        assert len(batch.rows) <= batch.shape.rows and len(batch.jobs) <= batch.shape.texts
        assert all(sum(len(j.ids) for j in row) <= batch.shape.width for row in batch.rows)


@given(st.lists(st.integers(1, 256), min_size=1, max_size=40))
def test_packed_tokens_lie_where_first_and_last_say(lengths: list[int]) -> None:
    for batch in drained(jobs(lengths, seconds=True)):
        shape, vector = batch.shape, pack(batch)
        assert vector.shape == (shape.packed,) and vector.dtype == np.int32
        per_token = vector[: SEGMENTS * shape.tokens].reshape(SEGMENTS, -1)
        ids, positions, segments, types = per_token
        first, last = vector[SEGMENTS * shape.tokens :].reshape(2, -1)
        for i, job in enumerate(batch.jobs):
            place = slice(first[i], last[i] + 1)
            np.testing.assert_array_equal(ids[place], job.ids)
            np.testing.assert_array_equal(positions[place], np.arange(len(job.ids)))
            np.testing.assert_array_equal(segments[place], i + 1)
            assert types[place].sum() == (len(job.ids) - job.second if job.second else 0)
            assert first[i] // shape.width == last[i] // shape.width, "a text crosses rows"
        assert (segments > 0).sum() == sum(len(job.ids) for job in batch.jobs)


def test_a_long_queue_of_mixed_texts_wastes_little() -> None:
    lengths = np.random.default_rng(0).integers(3, 120, 2000).tolist()
    batches = drained(jobs(lengths))
    ran = sum(batch.shape.tokens for batch in batches)
    assert sum(lengths) / ran > 0.85


def test_one_short_text_runs_in_the_smallest_program() -> None:
    [batch] = drained(jobs([9]))
    assert batch.shape == KNOWN[0] and batch.shape.tokens == 32


def test_shapes_reach_the_longest_text_even_beyond_the_budget() -> None:
    known = shapes(512, 4096)
    assert max(shape.width for shape in known) == 4096
    assert {shape.rows for shape in known if shape.width > 512} == {1}
    assert all(shape.tokens <= 512 or shape.rows == 1 for shape in known)
    assert min(shape.width for shape in shapes(512, 5)) == 8
