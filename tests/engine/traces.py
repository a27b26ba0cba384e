"""Random traces of requests, turns and aborts, and what they must come to."""

from typing import Any

from hypothesis import strategies as st

from octavo.engine.core import EngineCore
from tests.engine.invariants import check, check_drained, strict_order
from tests.engine.tiny import EOS, Client, Reference, prompt

LONGEST = 96

# What takes other ways through the engine and must not change the text. "stops" has more than the
# device checks.
STOPS = [*range(20, 29), *EOS]
EXTRAS: dict[str, dict[str, Any]] = {
    "": {},
    "logprobs": {"logprobs": 2},
    "prompt_logprobs": {"prompt_logprobs": 1},
    "mask": {"bad_words": [[3, 3, 4, 4]]},
    "stops": {"ignore_eos": True, "stop_token_ids": STOPS},
}

requests = st.fixed_dictionaries(
    {
        "length": st.one_of(st.integers(0, 40), st.sampled_from([4, 8, 16, 32, 64, 90])),
        "which": st.integers(0, 1),
        "tail": st.integers(0, 5),
        "tail_seed": st.integers(0, 2),
        "max_tokens": st.one_of(st.integers(1, 12), st.sampled_from([1, 30, 60, None])),
        "n": st.sampled_from([1, 1, 1, 2, 3]),
        "warm": st.booleans(),
        "priority": st.integers(-1, 1),
        "salt": st.sampled_from(["", "", "other"]),
        "extra": st.sampled_from(["", "", "", "logprobs", "mask", "stops", "prompt_logprobs"]),
    }
)
steps = st.one_of(
    st.tuples(st.just("add"), requests),
    st.tuples(st.just("add"), requests),
    st.tuples(st.just("turns"), st.integers(1, 6)),
    st.tuples(st.just("abort"), st.integers(0, 30)),
)
traces = st.lists(steps, min_size=5, max_size=30)
rules = st.fixed_dictionaries(
    {
        "depth": st.integers(1, 4),
        "prefix_caching": st.booleans(),
        "by_priority": st.booleans(),
        "budget": st.sampled_from([0, 16]),
        "steps": st.sampled_from([1, 3]),
    }
)


def add(client: Client, r: dict[str, Any], asked: dict[int, Any]) -> None:
    """Send one drawn request, and note what each of its choices must give."""
    warm = r["warm"] or r["n"] > 1
    text = prompt(max(r["length"], 1 - r["tail"]), r["which"], r["tail"], r["tail_seed"])
    drawn = {"temperature": 0.8, "seed": 7 + r["tail_seed"]} if warm else {}
    extra = r.get("extra", "")
    sampling = drawn | EXTRAS[extra] | {"n": r["n"], "max_tokens": r["max_tokens"]}
    handle = client.add(text, priority=r["priority"], salt=r["salt"], **sampling)
    if extra == "stops":
        drawn |= {"stops": STOPS}
    for choice in range(r["n"]):
        asked[handle + choice] = (text, r["max_tokens"] or LONGEST, drawn | {"choice": choice})


def run_trace(core: EngineCore, reference: Reference, trace: list[Any]) -> Client:
    """Play a trace, check after every turn, and compare every text at the end."""
    client = Client(core)
    asked: dict[int, Any] = {}
    with strict_order():
        for kind, what in trace:
            if kind == "add":
                add(client, what, asked)
            elif kind == "abort" and asked:
                client.abort([what % len(asked)])
            elif kind == "turns":
                for _ in range(what):
                    client.turn()
                    check(core)
        for _ in range(3000):
            if not core.has_work():
                break
            client.turn()
            check(core)
    check_drained(core)
    assert core.recovery.restarts == 0
    for handle, (text, count, sampling) in asked.items():
        want = reference.text(text, count, **sampling)
        got = client.tokens[handle]
        if handle in client.aborted:
            assert got == want[: len(got)] and handle not in client.finished
        else:
            assert got == want, f"{handle=} {len(text)=}"
            ended = got[-1] in sampling.get("stops", reference.eos)
            assert client.finished[handle].reason == ("stop" if ended else "length")
    return client
