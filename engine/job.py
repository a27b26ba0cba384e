"""One program to compile: what it is called, made from and given."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax


@dataclass
class Job:
    """A program to compile."""

    name: str
    place: Callable[[Any], None]  # where it goes
    function: Any
    arguments: tuple[Any, ...]  # abstract
    donate: tuple[int, ...] = ()
    tokens: int = 0  # that it runs
    static: tuple[Any, ...] = ()  # what the function was made with, besides sizes and model

    @property
    def details(self) -> tuple[Any, ...]:
        """What decides the program besides the model, for a name on disk."""
        return shapes_of(self.arguments), self.donate, self.tokens, self.static


def forward_key(rows: int, tokens: int, context: int = 0) -> tuple[int, ...]:
    """Where `Programs.forward` has the program of R rows and T tokens; 0 pages are all."""
    return (rows, tokens, context) if context else (rows, tokens)


def shapes_of(tree: Any) -> tuple[Any, ...]:
    """Everything about a tree of abstract arrays that a program depends on."""
    leaves, structure = jax.tree.flatten(tree)
    return [(leaf.shape, str(leaf.dtype)) for leaf in leaves], str(structure)
