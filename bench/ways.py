"""Several ways to compute the same thing, compared and timed in turns."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

CALLS = 4  # in a row, of one round


@dataclass
class Found:
    """What came of one way."""

    failure: str = ""  # why it cannot be taken; the rest is nothing then
    seconds: float = float("inf")  # of a call, in the fastest round
    apart: float = 0.0  # largest difference from the first way, as a part of its largest number


def compare(
    ways: Mapping[str, Any],
    given: Mapping[str, tuple[Any, ...]],
    rounds: int,
    refusal: type[Exception] = jax.errors.JaxRuntimeError,
) -> dict[str, Found]:
    """By name. A way is called without arguments for its compiled program, which takes `given`;
    where that raises `refusal`, the others go on."""
    found = {name: Found() for name in ways}
    programs: dict[str, Any] = {}
    first: Any = None
    for name, way in ways.items():
        try:
            program = way()
            result = program(*given[name]).astype(jnp.float32)
            first = result if first is None else first
            apart = float(jnp.max(jnp.abs(result - first)) / jnp.max(jnp.abs(first)))
        except refusal as failure:
            found[name].failure = str(failure).splitlines()[0]
            continue
        programs[name], found[name].apart = program, apart
    for _ in range(rounds):  # in turns: a device's clock changes with its warmth
        for name, program in programs.items():
            found[name].seconds = min(found[name].seconds, once(program, given[name]))
    return found


def once(program: Any, given: tuple[Any, ...]) -> float:
    """Seconds of one call, of several in a row."""
    began = time.perf_counter()
    for _ in range(CALLS):
        result = program(*given)
    jax.block_until_ready(result)
    return (time.perf_counter() - began) / CALLS
