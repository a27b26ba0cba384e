"""Golden tokens while 32 requests of mixed lengths fight over a pool for one and a half of them."""

import random
from typing import Any

import pytest

from octavo import LLM, SamplingParams
from tests.e2e.golden import CHAT, COMPLETION, SMALL, Row, need

# Every chunking, with and without the prefix cache, reading at once and late.
ENGINES: dict[str, dict[str, Any]] = {
    "chunks of 16, cached, depth 1": {"max_num_batched_tokens": 16, "steps_in_flight": 1},
    "chunks of 128, cached, depth 3": {"steps_in_flight": 3},
    "chunks of 128, uncached, depth 1": {"steps_in_flight": 1, "enable_prefix_caching": False},
    "whole, uncached, depth 3": {
        "max_num_batched_tokens": 256,
        "steps_in_flight": 3,
        "enable_prefix_caching": False,
    },
}
OPENING = list(range(1000, 1048))  # three pages that many prompts share


def mixed() -> list[tuple[list[int], SamplingParams]]:
    """32 requests of 1 to 178 prompt tokens and 1 to 60 output tokens, some alike, some sampled.

    The first eight are short and then grow together past the pages there are.
    """
    dice = random.Random(5)
    jobs = []
    for i in range(32):
        length = 7 if i < 8 else dice.choice((1, 7, 16, 33, 90, 130))
        own = [dice.randrange(100, 40_000) for _ in range(length)]
        prompt = OPENING + own if i >= 8 and i % 3 == 0 else own
        params = SamplingParams(
            temperature=dice.choice((0.0, 1.0)),
            seed=i,
            max_tokens=60 if i < 8 else dice.choice((1, 5, 24)),
            ignore_eos=True,
        )
        jobs.append((prompt, params))
    return jobs


def golden_jobs(llm: LLM) -> list[tuple[Any, Row]]:
    chat = llm._text.chat(CHAT.chat)[1]
    return [(COMPLETION.input_ids, COMPLETION), (chat, CHAT)]


@pytest.mark.parametrize("settings", ENGINES.values(), ids=ENGINES)
def test_golden_tokens_beside_32_others_in_a_pool_too_small(settings: dict[str, Any]) -> None:
    need("smollm2-135m")
    with LLM("smollm2-135m", quiet=True, **{**SMALL, **settings}) as llm:
        jobs: list[tuple[Any, SamplingParams, Row | None]] = [(p, s, None) for p, s in mixed()]
        for at in (4, 9, 20, 31):
            jobs[at:at] = [(p, row.greedy, row) for p, row in golden_jobs(llm)]
        outputs = llm.generate([p for p, _, _ in jobs], [s for _, s, _ in jobs], use_tqdm=False)
        for output, (_, params, row) in zip(outputs, jobs, strict=True):
            ids = output.outputs[0].token_ids
            if row is None:
                assert len(ids) == params.max_tokens
            else:
                assert list(ids) == row.output_ids, row.id
        stats = llm.core.stats()
        assert stats.preemptions > 0
        assert stats.compiles_after_ready == 0
        assert (stats.running, stats.waiting, stats.in_flight) == (0, 0, 0)
        assert stats.pages_free[0] + stats.pages_cached[0] == stats.pages[0] == 23
        if llm.config.enable_prefix_caching:
            # Far more pages got a name than there are, so most were evicted again.
            assert stats.prefix_hits > 0 and llm.core.host.pools[0].index.idle <= 23
        else:
            assert stats.prefix_hits == stats.pages_cached[0] == 0
