"""Programs that are handed only the leaves of the state that they touch.

What goes through a program unchanged still costs the host a few microseconds a leaf at every
dispatch. A leaf that a program does not touch is None where it is traced, and stays behind where
it is called.
"""

from dataclasses import dataclass, fields, replace
from typing import Any

from octavo.engine.state import EngineState, PageState, SlotState

PAGES = ("table", "held", "free_stack", "free_top")  # what a forward pass touches of a group's
ROWS = ("active", "length", "last")  # and of the slots
CHUNKS = (*ROWS, "history")  # with prompt tokens
GREEDY = (*ROWS, "terms", "history")
SAMPLE = (*GREEDY, "counts", "bias_ids", "bias")


def lend(state: Any, slots: tuple[str, ...]) -> Any:
    """An EngineState or a SlotState with only these leaves of the slots."""
    if isinstance(state, EngineState):
        pages = tuple(_only(group, PAGES) for group in state.pages)
        return replace(state, slots=_only(state.slots, slots), pages=pages)
    return _only(state, slots)


def give_back(after: Any, before: Any) -> Any:
    """What a program made of `lend(before)`, with what stayed behind."""
    if isinstance(after, EngineState):
        pages = tuple(_with(*pair) for pair in zip(after.pages, before.pages, strict=True))
        return replace(after, slots=_with(after.slots, before.slots), pages=pages)
    return _with(after, before)


def _only(tree: Any, names: tuple[str, ...]) -> Any:
    kind: Any = type(tree)
    return kind(**{f.name: getattr(tree, f.name) if f.name in names else None for f in _of(tree)})


def _with(tree: Any, before: Any) -> Any:
    missing = {f.name: getattr(before, f.name) for f in _of(tree) if getattr(tree, f.name) is None}
    return replace(tree, **missing)


def _of(tree: SlotState | PageState) -> Any:
    return fields(tree)


@dataclass(frozen=True)
class Thin:
    """A compiled program whose second argument, and first result, is the state or its slots."""

    program: Any
    slots: tuple[str, ...]

    def __call__(self, params: Any, state: Any, *more: Any) -> Any:
        """The program's results, the first one whole."""
        after, *rest = self.program(params, lend(state, self.slots), *more)
        return (give_back(after, state), *rest)
