"""Which texts run together, and where their tokens lie. Host code without jax.

A program reads `rows` rows of `width` tokens. The oldest text decides the width; texts of that
width come after it in order, then shorter ones that fit into what is left of the rows:

    width 64    [ oldest, 50 tokens          ][ 12 ]
                [ 41              ][ 20         ]
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

LOOK = 1024  # texts of the queue that are looked at for one batch
TOKENS_PER_TEXT = 8  # a batch of N tokens takes up to N / 8 texts, or one a row where that is more
SMALLEST = 32  # tokens in the shortest rows
SEGMENTS = 4  # vectors of N tokens in a packed batch: ids, positions, segments, types


@dataclass(frozen=True)
class Job:
    """One text that waits for its vector."""

    handle: int
    ids: np.ndarray  # i32[n]
    second: int = 0  # where the second text of a pair begins; 0: there is one text
    arrival: float = 0.0


@dataclass(frozen=True, order=True)
class Shape:
    """Rows of one width, and the most texts that they may hold: what a program is compiled for."""

    width: int
    rows: int

    @property
    def tokens(self) -> int:
        return self.width * self.rows

    @property
    def texts(self) -> int:
        return max(self.rows, self.tokens // TOKENS_PER_TEXT)

    @property
    def packed(self) -> int:
        """Length of the vector that the program takes."""
        return SEGMENTS * self.tokens + 2 * self.texts


@dataclass
class Batch:
    """The texts of one step."""

    shape: Shape
    rows: list[list[Job]] = field(default_factory=list)

    @property
    def jobs(self) -> list[Job]:
        return [job for row in self.rows for job in row]


def shapes(most_tokens: int, longest: int) -> tuple[Shape, ...]:
    """Widths double up to `longest`; rows of each grow fourfold up to `most_tokens` in all."""
    found = []
    width = min(SMALLEST, 1 << (longest - 1).bit_length())
    while True:
        most = max(1, most_tokens // width)
        rows = 1
        while rows < most:
            found.append(Shape(width, rows))
            rows *= 4
        found.append(Shape(width, most))
        if width >= longest:
            return tuple(found)
        width *= 2


def choose(queue: Iterable[Job], known: Sequence[Shape]) -> Batch:
    """The next batch of a queue that is not empty. The queue is not changed."""
    looked = list(islice(queue, LOOK))
    smallest = known[0].width
    widths = [max(smallest, 1 << (len(job.ids) - 1).bit_length()) for job in looked]
    width = widths[0]
    mine = [shape for shape in known if shape.width == width]
    # Those of this width first: each opens a row where none has room. Then shorter ones, into gaps.
    rows = Rows(width, mine[-1].rows, mine[-1].texts)
    for job, own in zip(looked, widths, strict=True):
        if own == width and not rows.put(job, opening=True) and rows.full:
            break
    for job, own in zip(looked, widths, strict=True):
        if own < width and not rows.put(job, opening=False) and rows.full:
            break
    return _fitted(rows.jobs, mine)


class Rows:
    """Rows that fill up: a text goes into the first with room for it."""

    def __init__(self, width: int, most_rows: int, most_texts: int) -> None:
        self.jobs: list[list[Job]] = []
        self._room: list[int] = []  # per row
        self._most = 0  # the most room of any row
        self._left = most_texts
        self._width, self._most_rows = width, most_rows

    @property
    def full(self) -> bool:
        """Whether nothing more fits, however short."""
        return not self._left or (not self._most and len(self.jobs) == self._most_rows)

    def put(self, job: Job, opening: bool) -> bool:
        """Find a place, in a new row if need be and `opening`. False: there is none."""
        size = len(job.ids)
        if not self._left:
            return False
        if size <= self._most:
            at = next(i for i, room in enumerate(self._room) if room >= size)
        elif opening and len(self.jobs) < self._most_rows:
            at = len(self.jobs)
            self.jobs.append([])
            self._room.append(self._width)
        else:
            return False
        self.jobs[at].append(job)
        before = self._room[at]
        self._room[at] -= size
        if before >= self._most:
            self._most = max(self._room)
        self._left -= 1
        return True


def _fitted(rows: list[list[Job]], known: Sequence[Shape]) -> Batch:
    """The smallest shape that holds the rows, or a smaller one where it would be mostly empty."""
    count = len(rows)
    above = next(shape for shape in known if shape.rows >= count)
    below = [shape for shape in known if shape.rows <= count]
    if below and 2 * count <= above.rows:
        above = below[-1]
    rows = rows[: above.rows]
    while sum(map(len, rows)) > above.texts:
        rows[-1].pop()
        if not rows[-1]:
            rows.pop()
    return Batch(above, rows)


def pack(batch: Batch) -> np.ndarray:
    """i32[shape.packed]: ids, positions, segments and types of N tokens, first and last per text.

    Segment s is text s - 1 of the batch. Texts that are not there begin and end at token 0.
    """
    shape = batch.shape
    vector = np.zeros(shape.packed, np.int32)
    ids, positions, segments, types = vector[: SEGMENTS * shape.tokens].reshape(SEGMENTS, -1)
    first, last = vector[SEGMENTS * shape.tokens :].reshape(2, -1)
    text = 0
    for i, row in enumerate(batch.rows):
        at = i * shape.width
        for job in row:
            end = at + len(job.ids)
            ids[at:end] = job.ids
            positions[at:end] = np.arange(len(job.ids))
            segments[at:end] = text + 1
            if job.second:
                types[at + job.second : end] = 1
            first[text], last[text] = at, end - 1
            at, text = end, text + 1
    return vector
