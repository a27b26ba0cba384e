"""Engines that many tests share, because compiling them is what these tests cost."""

from collections.abc import Iterator
from dataclasses import replace

import pytest

from octavo.backends.record import Backend
from octavo.engine.assemble import Parts
from octavo.engine.core import EngineCore
from tests.engine.tiny import EOS, LLAMA, Reference, make_engine, make_parts


def few_buckets(backend: Backend) -> Backend:
    """Prompt buckets that a host may leave the larger of, so that chunks come in two sizes;
    programs of three decode steps, which a host may leave too; fewer chunks than slots."""
    return replace(
        backend,
        token_buckets=lambda most: tuple(sorted({16, most})),
        small_model=1 << 30,
        small_rows=(1, 2, 4),
        small_steps=3,
        most_chunks=5,
    )


@pytest.fixture(scope="session")
def llama_parts() -> Parts:
    """8 slots, 39 pages of 4 tokens: two of the longest sequences fill the pool."""
    return make_parts(
        LLAMA,
        eos=EOS,
        backend=few_buckets,
        max_model_len=96,
        max_num_seqs=8,
        max_num_batched_tokens=96,
        page_size=4,
        num_pages=40,
    )


@pytest.fixture(scope="session")
def llama(llama_parts: Parts) -> Iterator[EngineCore]:
    """The tiny engine; `begin_anew` gives it other rules and an empty host."""
    core = make_engine(llama_parts)
    yield core
    core.close()


@pytest.fixture(scope="session")
def reference(llama_parts: Parts) -> Reference:
    """What the tiny engine's sequences give alone."""
    return Reference(llama_parts)
