"""The step's functions in the form that programs have: of one shard, with its leading data axis.

Every leaf of the state has that axis, which a mesh cuts; a program sees one shard.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax

from octavo.engine import draw, step
from octavo.engine.state import EngineState, empty_pages, empty_slots


def one_shard(tree: Any) -> Any:
    """Drop the leading data axis of size 1."""
    return jax.tree.map(lambda a: a.reshape(a.shape[1:]), tree)


def as_shard(tree: Any) -> Any:
    """Add the leading data axis."""
    return jax.tree.map(lambda a: a.reshape((1, *a.shape)), tree)


def new_state(machine: step.Machine, init_kv: Callable[[], Any]) -> EngineState:
    """An empty state, one data shard; traceable."""
    dims = machine.dims
    pages = tuple(empty_pages(dims, group) for group in dims.groups)
    return as_shard(EngineState(slots=empty_slots(dims), pages=pages, kv=init_kv()))


def edit(machine: step.Machine) -> Any:
    def edit(slots: Any, pages: Any, vector: jax.Array) -> Any:
        return as_shard(step.edit(machine, one_shard(slots), one_shard(pages), vector[0]))

    return edit


def forward_key(rows: int, tokens: int, context: int = 0) -> tuple[int, ...]:
    """Where `Programs.forward` has the program of R rows and T tokens; 0 pages are all."""
    return (rows, tokens, context) if context else (rows, tokens)


def forward(machine: step.Machine, rows: int, tokens: int, context: int = 0) -> Any:
    def forward(params: Any, state: Any, vector: jax.Array | None = None) -> Any:
        plan = None if vector is None else vector[0]
        sizes = {"rows": rows, "tokens": tokens, "context": context}
        out = step.forward(machine, params, one_shard(state), plan, **sizes)
        return as_shard(out)

    return forward


def greedy(machine: step.Machine) -> Any:
    def greedy(head: Any, slots: Any, passed: Any) -> Any:
        after, packed, _ = draw.sample(
            machine, head, one_shard(slots), one_shard(passed), greedy=True
        )
        return as_shard((after, packed))

    return greedy


def sample(machine: step.Machine) -> Any:
    def sample(head: Any, slots: Any, passed: Any) -> Any:
        after, packed, _ = draw.sample(machine, head, one_shard(slots), one_shard(passed))
        return as_shard((after, packed))

    return sample


def masked(machine: step.Machine) -> Any:
    def masked(head: Any, slots: Any, passed: Any, mask: jax.Array) -> Any:
        after, packed, _ = draw.sample(machine, head, one_shard(slots), one_shard(passed), mask[0])
        return as_shard((after, packed))

    return masked


def whole(machine: step.Machine, rows: int, greedy: bool) -> Any:
    def whole(params: Any, state: Any) -> Any:
        """The state after, packed i32[4, R] and taken i32[...]."""
        head = machine.model.head(params)
        after, passed, taken = step.forward(
            machine, params, one_shard(state), None, rows=rows, tokens=0
        )
        slots, packed, _ = draw.sample(machine, head, after.slots, passed, greedy=greedy)
        return as_shard((replace(after, slots=slots), packed, taken))

    return whole


def several(machine: step.Machine, rows: int, steps: int, greedy: bool) -> Any:
    def several(params: Any, state: Any) -> Any:
        """The state after, packed i32[steps, 4, R] and taken i32[steps, ...] of every step."""
        head = machine.model.head(params)

        def one(
            state: EngineState, nothing: None
        ) -> tuple[EngineState, tuple[jax.Array, jax.Array]]:
            state, passed, taken = step.forward(machine, params, state, None, rows=rows, tokens=0)
            slots, packed, _ = draw.sample(machine, head, state.slots, passed, greedy=greedy)
            return replace(state, slots=slots), (packed, taken)

        after, (packed, taken) = jax.lax.scan(one, one_shard(state), length=steps)
        return as_shard((after, packed, taken))

    return several


def rich(machine: step.Machine, logprobs: int) -> Any:
    def rich(head: Any, slots: Any, passed: Any, mask: jax.Array, named: jax.Array) -> Any:
        rows = (one_shard(slots), one_shard(passed), mask[0], named[0])
        return as_shard(draw.sample(machine, head, *rows, logprobs=logprobs))

    return rich


def score(machine: step.Machine, logprobs: int) -> Any:
    def score(head: Any, hidden: jax.Array, targets: jax.Array, named: jax.Array) -> Any:
        parts = (hidden[0], targets[0], named[0])
        return as_shard(draw.score(machine, head, *parts, logprobs=logprobs))

    return score
