"""Programs kept on disk: found without tracing, told apart by all that decides them."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from octavo.engine import step
from octavo.engine.assemble import Parts, cache_maker, limits_of
from octavo.engine.programs import Programs
from octavo.engine.step import Machine
from octavo.engine.store import _HITS, HIT, Store
from tests.engine.tiny import LLAMA, make_parts

pytestmark = pytest.mark.usefixtures("without_the_cache_of_jax")


@pytest.fixture(scope="module")
def parts() -> Parts:
    return make_parts(LLAMA, max_model_len=64, max_num_seqs=1, page_size=16)


def build(parts: Parts, folder: Path | None) -> Programs:
    machine = Machine(parts.resolved.dims, parts.resolved.model, parts.backend)
    limits = replace(limits_of(parts.resolved.config, parts.resolved), token_buckets=(64,))
    programs = Programs(machine, limits, 5, folder)
    programs.compile(parts.params, cache_maker(parts.backend, parts.resolved))
    return programs


def run(programs: Programs, parts: Parts) -> list[Any]:
    """A decode step of a slot that holds nothing but its last token."""
    state = programs.empty()
    slots = replace(state.slots, active=state.slots.active | True, last=state.slots.last + 7)
    slots = replace(slots, terms=slots.terms + 9)
    state, passed, taken = programs.forward[1, 0](parts.params, replace(state, slots=slots))
    passed = replace(passed, chunk_hidden=None)
    head = parts.resolved.model.head(parts.params)
    _, packed = programs.greedy[1](head, state.slots, passed)
    return jax.tree.leaves(jax.device_get((passed.hidden, packed, taken)))


def test_a_second_start_traces_nothing_and_computes_the_same(
    parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build(parts, tmp_path)
    assert first.found == 0
    monkeypatch.setattr(step, "forward", None)  # a trace would call it
    second = build(parts, tmp_path)
    assert second.found == len(second.builds) == len(first.builds)
    for one, other in zip(run(first, parts), run(second, parts), strict=True):
        np.testing.assert_array_equal(one, other)
    assert second.workspace() == first.workspace()


def test_a_file_that_cannot_be_read_is_compiled_again(parts: Parts, tmp_path: Path) -> None:
    build(parts, tmp_path)
    for path in tmp_path.rglob("edit-*"):
        path.write_bytes(b"half a file")
    again = build(parts, tmp_path)
    assert again.found == len(again.builds) - 1
    assert build(parts, tmp_path).found == len(again.builds), "and is kept anew"


def test_nothing_is_kept_without_a_folder(parts: Parts, tmp_path: Path) -> None:
    assert build(parts, None).found == 0
    assert not list(tmp_path.iterdir())


def test_what_came_out_of_the_cache_of_jax_is_not_kept_again(tmp_path: Path) -> None:
    program = jax.jit(lambda x: x + 1).lower(1.0).compile()
    _HITS.take()
    _HITS.on_event(HIT)
    Store(tmp_path).save("one", (), program)
    assert not Store(tmp_path).has("one", ())
    Store(tmp_path).save("one", (), program)
    assert Store(tmp_path).has("one", ())


def test_a_name_tells_apart_what_programs_are_made_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {Store(tmp_path, size)._path("edit", shape) for size in (1, 2) for shape in "ab"}
    assert len(names) == 4
    monkeypatch.setenv("XLA_FLAGS", "--another=flag")
    assert Store(tmp_path, 1)._path("edit", "a") not in names


def test_what_nobody_read_for_a_month_goes(tmp_path: Path) -> None:
    store = Store(tmp_path)
    old, new = tmp_path / "old", tmp_path / "new"
    for path in (old, new):
        path.write_text("a program")
    os.utime(old, (0, 0))
    store.prune()
    assert new.exists() and not old.exists()
