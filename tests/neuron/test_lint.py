"""Every rule has a graph that breaks it, and says which operation of which line."""

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from octavo.backends.neuron import hlo
from octavo.backends.neuron.export import Signature, export
from octavo.backends.neuron.exported import Exported
from octavo.backends.neuron.lint import Finding, errors, lint
from octavo.backends.neuron.targets import target_of
from octavo.backends.neuron.wire import Message

INF2 = target_of("inf2")
X = jax.ShapeDtypeStruct((8, 16), jnp.float32)
IDS = jax.ShapeDtypeStruct((4,), jnp.int32)
BOUND: dict[str, Any] = {"mode": "promise_in_bounds", "wrap_negative_indices": False}


def exported(function: Callable[..., Any], *arguments: Any, **options: Any) -> Exported:
    """One result, called out."""
    names = tuple(f"in{i}" for i in range(len(arguments)))
    return export(function, arguments, Signature("graph", names, ("out",)), **options).exported


def variadic(x: jax.Array) -> Any:
    return jnp.argmax(x, axis=-1)


def endless(x: jax.Array) -> Any:
    return jax.lax.while_loop(lambda y: jnp.sum(y) > 0, lambda y: y - 1, x)


def conditional(x: jax.Array) -> Any:
    return jax.lax.cond(jnp.sum(x) > 0, lambda: x, lambda: -x)


def two_dimensions(x: jax.Array, i: jax.Array) -> Any:
    return x.at[i, i].get(**BOUND)


def integer_sum(x: jax.Array, i: jax.Array) -> Any:
    return x.astype(jnp.int32).at[i].add(1, **BOUND)


def integer_product(x: jax.Array) -> Any:
    y = x.astype(jnp.int32)
    return y @ y.T


def random(x: jax.Array) -> Any:
    return x + jax.lax.rng_bit_generator(jnp.zeros(4, jnp.uint32), x.shape)[1].astype(x.dtype)


def infinite(x: jax.Array) -> Any:
    return jnp.where(x > 0, x, -jnp.inf)


def outside(x: jax.Array) -> Any:
    return x.at[jnp.arange(6, dtype=jnp.int32) + 4].get(**BOUND)


def stranger(x: jax.Array) -> Any:
    return jax.ffi.ffi_call("unheard_of", jax.ShapeDtypeStruct(x.shape, x.dtype))(x)


BROKEN: dict[str, tuple[Callable[..., Any], tuple[Any, ...], str]] = {
    "N002": (lambda x: jax.lax.sort(x), (X,), "sort is no operator"),
    "N003": (lambda x: x.astype(jnp.int16) + 1, (X,), "s16 is no type"),
    "N004": (two_dimensions, (X, IDS), "index one dimension"),
    "N005": (integer_sum, (X, IDS), "does add on s32"),
    "N006": (variadic, (X,), "several arrays"),
    "N007": (endless, (X,), "the device decides"),
    "N008": (conditional, (X,), "compute both"),
    "N009": (stranger, (X,), "no custom call unheard_of"),
    "N015": (integer_product, (X,), "matrix product of s32"),
    "N016": (random, (X,), "hash integers"),
    "N018": (infinite, (X,), "not finite"),
    "N019": (outside, (X,), "indices from 4 to 9 into 8 rows"),
}


@pytest.mark.parametrize("rule", BROKEN)
def test_a_graph_that_breaks_a_rule_is_told_where(rule: str) -> None:
    function, arguments, message = BROKEN[rule]
    findings = [f for f in lint(exported(function, *arguments), INF2) if f.rule == rule]
    assert findings and message in findings[0].message
    assert findings[0].severity == "error"
    opcode = findings[0].operation.split(".")[0]
    assert opcode in hlo_text(function, arguments)
    lines, first = inspect.getsourcelines(function)
    ours = {f"neuron/test_lint.py:{n}" for n in range(first, first + len(lines))}
    if opcode != "constant":  # XLA keeps no line for those
        assert findings[0].where in ours
        assert f"({findings[0].operation} from {findings[0].where})" in str(findings[0])


def hlo_text(function: Callable[..., Any], arguments: tuple[Any, ...]) -> str:
    return str(jax.jit(function).lower(*arguments).compiler_ir("hlo").as_hlo_text())


def test_clean_forms_of_the_same_break_nothing() -> None:
    def clean(x: jax.Array, i: jax.Array) -> jax.Array:
        rows = x.at[i].get(**BOUND).at[i].set(1.0, **BOUND).at[i].add(2.0, **BOUND)
        best = jnp.where(rows == rows.max(-1, keepdims=True), jnp.arange(16, dtype=jnp.int32), 16)
        return jnp.where(best.min(-1)[:, None] > 3, rows, -1e30) @ rows.T

    assert lint(exported(clean, X, IDS), INF2) == []


def raw(function: Callable[..., Any], *arguments: Any) -> Exported:
    """What jax lowers, not made safe."""
    made = exported(function, *arguments)
    lowered = jax.jit(function).lower(*arguments).compiler_ir("hlo")
    return replace(made, hlo=lowered.as_serialized_hlo_module_proto())


def test_what_jax_lowers_has_wide_ids_and_calls() -> None:
    helper = jax.jit(lambda x: x * 2)
    findings = lint(raw(lambda x: helper(x) + helper(x + 1), X), INF2)
    assert {"N010", "N011"} <= {f.rule for f in findings}
    assert lint(exported(lambda x: helper(x) + helper(x + 1), X), INF2) == []


def test_a_dynamic_dimension_is_found() -> None:
    made = exported(lambda x: x + 1, X)
    module = hlo.Module.parse(made.hlo)
    last = module.main.instructions[-2]
    shape = Message.parse(last.shape)
    shape.put_ints(6, [1, 0])
    last.shape = shape.encode()
    assert rules(replace(made, hlo=module.encode())) == ["N001"]


def rules(made: Exported) -> list[str]:
    return sorted({f.rule for f in errors(lint(made, INF2))})


def sharded(function: Callable[..., Any], *arguments: Any, out: Any, ranks: int = 2) -> Exported:
    mesh = AbstractMesh((ranks,), ("model",))
    specs = tuple(PartitionSpec("model") for _ in arguments)
    mapped = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)
    return exported(mapped, *arguments, ranks=ranks)


def test_collectives_are_of_floats_over_all_ranks_and_said_once() -> None:
    whole = PartitionSpec()
    total = sharded(lambda x: jax.lax.psum(x, "model"), X, out=whole)
    assert lint(total, INF2) == []
    assert total.inputs[0].shape == (4, 16)  # of one rank
    integers = sharded(lambda x: jax.lax.psum(x, "model"), IDS, out=whole)
    assert rules(integers) == ["N012"]
    assert rules(replace(total, ranks=4)) == ["N012"]
    module = hlo.Module.parse(total.hlo)
    one = next(i for i in module.main.instructions if i.opcode == "all-reduce")
    one.rest.put(hlo.CHANNEL, 1)
    assert rules(replace(total, hlo=module.encode())) == ["N012"]


def test_no_more_communicators_than_there_are() -> None:
    def talkative(x: jax.Array) -> jax.Array:
        for turn in range(17):
            order = np.random.default_rng(turn).permutation(32).reshape(16, 2)
            x = jax.lax.psum(x, "model", axis_index_groups=order.tolist())
        return x

    many = jax.ShapeDtypeStruct((32, 2), jnp.float32)
    findings = errors(lint(sharded(talkative, many, out=PartitionSpec("model"), ranks=32), INF2))
    assert [f.rule for f in findings] == ["N012"] and "more than 16 different" in findings[
        0
    ].message


def test_a_graph_may_not_ask_for_its_rank() -> None:
    made = sharded(lambda x: x + jax.lax.axis_index("model"), X, out=PartitionSpec("model"))
    assert "N013" in rules(made)


def test_tensors_that_do_not_fit_are_refused() -> None:
    huge = jax.ShapeDtypeStruct((1 << 17, 1 << 15), jnp.float32)
    assert rules(exported(lambda x: x.sum(), huge)) == ["N014"]


def test_a_program_of_too_many_instructions_is_a_warning() -> None:
    wide = jax.ShapeDtypeStruct((1 << 18, 1 << 13), jnp.bfloat16)
    square = jax.ShapeDtypeStruct((1 << 13, 1 << 13), jnp.bfloat16)

    def often(x: jax.Array, w: jax.Array) -> jax.Array:
        for _ in range(4):
            x = x @ w
        return x[0]

    found = lint(exported(often, wide, square), INF2)
    assert [(f.rule, f.severity) for f in found] == [("N017", "warning")]


def test_a_cache_that_is_not_written_in_place_is_found() -> None:
    def write(kv: jax.Array) -> jax.Array:
        return kv + 1

    signature = Signature("write", ("state.kv",), ("state.kv",))
    kept = export(write, (X,), signature).exported
    assert rules(kept) == ["N020"]
    donated = export(write, (X,), signature, donate=(0,)).exported
    assert lint(donated, INF2) == [] and donated.aliases == ((0, 0),)
    renamed = replace(donated, outputs=(replace(donated.outputs[0], leaf="state.other"),))
    assert rules(renamed) == ["N020"]


def test_a_reduction_with_or_is_only_a_warning() -> None:
    found = lint(exported(lambda x: jnp.any(x > 0, axis=0).astype(jnp.int32), X), INF2)
    assert [(f.rule, f.severity) for f in found] == [("N006", "warning")]


def test_a_finding_reads_as_one_sentence() -> None:
    finding = Finding("N006", "a reduce of several arrays", "reduce.4 s32[8]", "octavo/a.py:7")
    assert str(finding) == "N006: a reduce of several arrays (reduce.4 s32[8] from octavo/a.py:7)"
