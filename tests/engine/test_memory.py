"""`resolve`: what fits is taken, and what does not is refused with numbers and a way out."""

from dataclasses import replace
from typing import Any

import pytest

from octavo.backends.record import Backend
from octavo.backends.select import select
from octavo.engine.config import ConfigError, EngineConfig
from octavo.engine.memory import MiB, Resolved, resolve
from octavo.models.config import ModelConfig
from tests.engine.tiny import GEMMA3, LLAMA, MISTRAL


def backend(limit: int) -> Backend:
    """The CPU's record with a fixed amount of memory."""
    return replace(select("cpu"), memory_limit=lambda: limit)


def sized(facts: dict[str, Any], limit: int = 1 << 30, **settings: Any) -> Resolved:
    config = EngineConfig(**settings)
    config.validate()
    return resolve(config, backend(limit), ModelConfig.from_hf(facts))


LONG = LLAMA | {"max_position_embeddings": 1 << 17}


def test_what_is_planned_stays_within_what_is_usable() -> None:
    for limit in (100 * MiB, 200 * MiB, 1 << 30, 1 << 36):
        memory = sized(LONG, limit).memory
        assert memory.total <= memory.usable <= limit
        assert memory.max_model_len == sized(LONG, limit).max_model_len


def test_auto_takes_the_longest_sequence_that_fits() -> None:
    small, large = sized(LONG, 120 * MiB), sized(LONG, 1 << 36)
    assert small.max_model_len < large.max_model_len == 1 << 17
    assert small.dims.pages_per_slot <= small.dims.groups[0].pages - 1
    assert small.model.max_model_len == small.max_model_len


def test_a_length_that_was_asked_for_is_never_shortened() -> None:
    with pytest.raises(ConfigError, match=r"does not fit.*131,072 tokens needs"):
        sized(LONG, 100 * MiB, max_model_len=1 << 17)


def test_a_model_larger_than_the_device_is_refused_with_a_hint() -> None:
    with pytest.raises(ConfigError, match=r"hint: a smaller model") as refusal:
        sized(LLAMA | {"hidden_size": 4096, "intermediate_size": 8192}, 50 * MiB)
    assert "MiB of weights" in str(refusal.value) and "50.00 MiB on cpu" in str(refusal.value)


def test_a_context_longer_than_the_model_knows_is_refused() -> None:
    with pytest.raises(ConfigError, match="trained for 256; use --max-model-len 256"):
        sized(LLAMA, max_model_len=1000)


@pytest.mark.parametrize("pages", [3, 9, 40])
def test_num_pages_is_taken_as_it_is_and_bounds_the_length(pages: int) -> None:
    got = sized(LLAMA, num_pages=pages, page_size=16)
    assert [group.pages for group in got.dims.groups] == [pages]
    assert got.max_model_len == min(256, (pages - 1) * 16)


def test_too_few_pages_for_the_length_asked_for_are_refused_by_their_name() -> None:
    with pytest.raises(ConfigError, match=r"`num_pages` is 9.*at least 17"):
        sized(LLAMA, num_pages=9, page_size=16, max_model_len=256)
    with pytest.raises(ConfigError, match=r"`num_pages` is 2.*at least 17"):
        sized(LLAMA, num_pages=2, page_size=16)


@pytest.mark.parametrize("facts", [MISTRAL, GEMMA3])
def test_a_window_pool_holds_what_its_rows_can_see_and_no_more(facts: dict[str, Any]) -> None:
    facts = facts | {"max_position_embeddings": 4096, "sliding_window": 64}
    got = sized(facts, max_num_seqs=8, max_num_batched_tokens=128, page_size=16)
    for group in got.dims.groups:
        if group.window:
            whole = 8 * got.dims.pages_per_slot + 1
            assert 8 * (64 // 16 + 1) < group.pages < whole
        else:
            assert group.pages == 8 * got.dims.pages_per_slot + 1


@pytest.mark.parametrize("facts", [MISTRAL, GEMMA3])
def test_too_few_pages_for_a_window_and_a_chunk_are_refused(facts: dict[str, Any]) -> None:
    """A window of 12 and a chunk of 32 need 12 pages of 4, and the trash page."""
    settings = {"max_num_batched_tokens": 32, "page_size": 4, "max_model_len": 48}
    with pytest.raises(ConfigError, match=r"`num_pages` is 12.*at least 13"):
        sized(facts, num_pages=12, **settings)
    assert sized(facts, num_pages=13, **settings).dims.groups[-1].pages == 13


def test_the_plan_reads_as_a_table() -> None:
    lines = sized(LLAMA).memory.lines()
    assert [line.split()[0] for line in lines] == [
        "device",
        "weights",
        "cache",
        "state",
        "workspace",
        "total",
        "fits",
    ]


def test_budgets_are_no_larger_than_the_longest_sequence_needs() -> None:
    got = sized(LLAMA, max_model_len=100, max_num_batched_tokens=4096)
    assert got.token_buckets[-1] == 128


def test_a_small_model_has_no_steps_that_take_as_long_as_larger_ones() -> None:
    def buckets(small_model: int, most: int) -> tuple[int, ...]:
        record = replace(backend(1 << 30), small_model=small_model, small_tokens=128)
        settings = EngineConfig(max_num_batched_tokens=most)
        return resolve(settings, record, ModelConfig.from_hf(LLAMA)).token_buckets

    assert buckets(0, 256) == (32, 128, 256)
    assert buckets(1 << 30, 256) == (128, 256)
    assert buckets(1 << 30, 64) == (64,)
