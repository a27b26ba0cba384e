"""Every rule has a graph that breaks it, and says which operation of which line."""

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from octavo.backends.neuron import hlo
from octavo.backends.neuron import lint as rules_of_lint
from octavo.backends.neuron.export import Signature, export
from octavo.backends.neuron.exported import Exported
from octavo.backends.neuron.lint import Finding, errors, lint
from octavo.backends.neuron.targets import target_of
from octavo.backends.neuron.wire import Message

INF2 = target_of("inf2")
X = jax.ShapeDtypeStruct((8, 16), jnp.float32)
IDS = jax.ShapeDtypeStruct((4,), jnp.int32)
HUGE = jax.ShapeDtypeStruct((1 << 17, 1 << 15), jnp.float32)
MANY = (
    jax.ShapeDtypeStruct((1 << 18, 1 << 13), jnp.bfloat16),
    jax.ShapeDtypeStruct((1 << 13, 1 << 13), jnp.bfloat16),
)
WHOLE = PartitionSpec()
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


def called(x: jax.Array) -> Any:
    helper = jax.jit(lambda y: y * 2)
    return helper(x) + helper(x + 1)


def total(x: jax.Array) -> Any:
    return jax.lax.psum(x, "model")


def who(x: jax.Array) -> Any:
    return x + jax.lax.axis_index("model")


def often(x: jax.Array, w: jax.Array) -> Any:
    for _ in range(4):
        x = x @ w
    return x[0]


def written(kv: jax.Array) -> Any:
    return kv + 1


def raw(function: Callable[..., Any], *arguments: Any) -> Exported:
    """What jax lowers, not made safe."""
    made = exported(function, *arguments)
    lowered = jax.jit(function).lower(*arguments).compiler_ir("hlo")
    return replace(made, hlo=lowered.as_serialized_hlo_module_proto())


def dynamic(function: Callable[..., Any], *arguments: Any) -> Exported:
    """Its last operation has a dimension that is known only when it runs."""
    made = exported(function, *arguments)
    module = hlo.Module.parse(made.hlo)
    last = module.main.instructions[-2]
    shape = Message.parse(last.shape)
    shape.put_ints(6, [1, 0])
    last.shape = shape.encode()
    return replace(made, hlo=module.encode())


def sharded(
    function: Callable[..., Any], *arguments: Any, out: Any = WHOLE, ranks: int = 2
) -> Exported:
    """One rank's part, of arguments that are cut along their first axis."""
    mesh = AbstractMesh((ranks,), ("model",))
    specs = tuple(PartitionSpec("model") for _ in arguments)
    mapped = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)
    return exported(mapped, *arguments, ranks=ranks)


def state(function: Callable[..., Any], *arguments: Any, donate: tuple[int, ...] = ()) -> Exported:
    """It takes the cache, and returns it."""
    signature = Signature("write", ("state.kv",), ("state.kv",))
    return export(function, arguments, signature, donate=donate).exported


@dataclass(frozen=True)
class Broken:
    """A module that breaks a rule: how it is made, and what is said of it."""

    function: Callable[..., Any]
    message: str
    operation: str  # how its name begins
    arguments: tuple[Any, ...] = (X,)
    make: Callable[..., Exported] = exported
    severity: str = "error"


BROKEN = {
    "N001": Broken(lambda x: x + 1, "known only when it runs; use buckets", "add", make=dynamic),
    "N002": Broken(lambda x: jax.lax.sort(x), "sort is no operator", "sort"),
    "N003": Broken(lambda x: x.astype(jnp.int16) + 1, "s16 is no type", "convert"),
    "N004": Broken(two_dimensions, "index one dimension", "gather", (X, IDS)),
    "N005": Broken(integer_sum, "does add on s32", "scatter", (X, IDS)),
    "N006": Broken(variadic, "several arrays", "reduce"),
    "N007": Broken(endless, "the device decides", "while"),
    "N008": Broken(conditional, "compute both", "conditional"),
    "N009": Broken(stranger, "no custom call unheard_of", "custom-call"),
    "N010": Broken(called, "number them from 1", "", make=raw),
    "N011": Broken(called, "should have put its body here", "", make=raw),
    "N012": Broken(total, "a collective of s32", "all-reduce", (IDS,), sharded),
    "N013": Broken(who, "pass it as an input", "partition-id", (X,), sharded),
    "N014": Broken(lambda x: x.sum(), "the largest in0, and inf2 has", "parameter", (HUGE,)),
    "N015": Broken(integer_product, "matrix product of s32", "dot"),
    "N016": Broken(random, "hash integers", "rng-bit-generator"),
    "N017": Broken(often, "smaller buckets or more cores", "dot", MANY, severity="warning"),
    "N018": Broken(infinite, "not finite", "constant"),
    "N019": Broken(outside, "indices from 4 to 9 into 8 rows", "gather"),
    "N020": Broken(written, "state.kv is written to a new buffer; donate it", "add", make=state),
}
# XLA keeps no line of these.
NO_LINE = ("constant", "parameter")


@pytest.mark.parametrize("rule", BROKEN)
def test_a_graph_that_breaks_a_rule_is_told_which_operation_of_which_line(rule: str) -> None:
    broken = BROKEN[rule]
    made = broken.make(broken.function, *broken.arguments)
    found = [f for f in lint(made, INF2) if f.rule == rule]
    assert found and broken.message in found[0].message
    assert found[0].severity == broken.severity
    operations = [i.name for c in hlo.Module.parse(made.hlo).computations for i in c.instructions]
    assert found[0].operation.split()[0] in operations
    assert found[0].operation.startswith(broken.operation)
    assert found[0].operation in str(found[0]) and "\n" not in str(found[0])
    lines, first = inspect.getsourcelines(broken.function)
    ours = {f"neuron/test_lint.py:{n}" for n in range(first, first + len(lines))}
    if broken.operation not in NO_LINE:
        assert found[0].where in ours
        assert f"({found[0].operation} from {found[0].where})" in str(found[0])


def test_every_rule_of_the_guide_has_a_graph_that_breaks_it() -> None:
    guide = Path(__file__).parents[2] / "docs" / "neuron-graphs.md"
    assert re.findall(r"^\| (N\d+) \|", guide.read_text(), re.M) == list(BROKEN)
    assert set(re.findall(r'"(N\d{3})"', inspect.getsource(rules_of_lint))) == set(BROKEN)


def test_clean_forms_of_the_same_break_nothing() -> None:
    def clean(x: jax.Array, i: jax.Array) -> jax.Array:
        rows = x.at[i].get(**BOUND).at[i].set(1.0, **BOUND).at[i].add(2.0, **BOUND)
        best = jnp.where(rows == rows.max(-1, keepdims=True), jnp.arange(16, dtype=jnp.int32), 16)
        return jnp.where(best.min(-1)[:, None] > 3, rows, -1e30) @ rows.T

    assert lint(exported(clean, X, IDS), INF2) == []


def test_what_jax_lowers_has_wide_ids_and_calls() -> None:
    assert {"N010", "N011"} <= {f.rule for f in lint(raw(called, X), INF2)}
    assert lint(exported(called, X), INF2) == []


def rules(made: Exported) -> list[str]:
    return sorted({f.rule for f in errors(lint(made, INF2))})


def test_collectives_are_of_floats_over_all_ranks_and_said_once() -> None:
    made = sharded(total, X)
    assert lint(made, INF2) == []
    assert made.inputs[0].shape == (4, 16)  # of one rank
    assert rules(sharded(total, IDS)) == ["N012"]
    assert rules(replace(made, ranks=4)) == ["N012"]
    module = hlo.Module.parse(made.hlo)
    one = next(i for i in module.main.instructions if i.opcode == "all-reduce")
    one.rest.put(hlo.CHANNEL, 1)
    assert rules(replace(made, hlo=module.encode())) == ["N012"]


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


def test_a_cache_that_is_not_written_in_place_is_found() -> None:
    assert rules(state(written, X)) == ["N020"]
    donated = state(written, X, donate=(0,))
    assert lint(donated, INF2) == [] and donated.aliases == ((0, 0),)
    renamed = replace(donated, outputs=(replace(donated.outputs[0], leaf="state.other"),))
    assert rules(renamed) == ["N020"]


def test_a_reduction_with_or_is_only_a_warning() -> None:
    found = lint(exported(lambda x: jnp.any(x > 0, axis=0).astype(jnp.int32), X), INF2)
    assert [(f.rule, f.severity) for f in found] == [("N006", "warning")]


def test_a_finding_reads_as_one_sentence() -> None:
    finding = Finding("N006", "a reduce of several arrays", "reduce.4 s32[8]", "octavo/a.py:7")
    assert str(finding) == "N006: a reduce of several arrays (reduce.4 s32[8] from octavo/a.py:7)"
