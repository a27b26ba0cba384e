"""Questions of `octavo doctor neuron` whose answer changes nothing: Octavo avoids what they ask of.

A probe that is proven says that AWS's software takes what Octavo's exporter writes differently.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, PartitionSpec

from octavo.backends.neuron import detect, hlo
from octavo.backends.neuron.conformance import Bench, Check, Entry
from octavo.backends.neuron.errors import CompileFailed
from octavo.backends.neuron.export import Signature, export
from octavo.backends.neuron.exported import Exported
from octavo.backends.neuron.wire import Message

F32 = jax.ShapeDtypeStruct((8, 1024), jnp.float32)


def _compiles(name: str, module: bytes, bench: Bench, ranks: int = 1) -> str:
    exported = Exported(name, module, (), (), (), ranks)
    try:
        bench.cache().get(exported, bench.options())
    except CompileFailed as error:
        raise RuntimeError(f"refused ({error.code or 'see ' + str(error.log)})") from None
    return "accepted"


def _raw(name: str, function: Callable[[jax.Array], Any]) -> Check:
    """The module as jax lowers it: 64-bit ids, and whatever the function asks for."""

    def check(bench: Bench) -> str:
        lowered = jax.jit(function).trace(F32).lower(lowering_platforms=("cpu",))
        module = lowered.compiler_ir("hlo").as_serialized_hlo_module_proto()
        return _compiles(name, module, bench)

    return check


def _called(x: jax.Array) -> jax.Array:
    double = jax.jit(lambda y: y * 2)
    return double(x) + double(x + 1)


def _device_list(bench: Bench) -> str:
    """A sum over ranks that are listed in jax's field instead of the replica groups."""
    mesh, spec = AbstractMesh((2,), ("model",)), PartitionSpec("model")
    total = jax.shard_map(
        lambda x: jax.lax.psum(x, "model"), mesh=mesh, in_specs=spec, out_specs=PartitionSpec()
    )
    made = export(total, (F32,), Signature("device_list", ("x",), ("y",)), ranks=2).exported
    module = hlo.Module.parse(made.hlo)
    for one in module.main.instructions:
        if groups := one.rest.all(hlo.GROUPS):
            listed = Message()
            for group in groups:
                listed.add(1, group)
            one.rest.drop(hlo.GROUPS)
            one.rest.put(hlo.DEVICE_LIST, listed)
            one.rest.put(hlo.CHANNEL, 1)
            one.rest.put(hlo.GLOBAL_IDS, 1)
    return _compiles("device_list", module.encode(), bench, ranks=2)


def _stablehlo(bench: Bench) -> str:
    lowered = jax.jit(lambda x: x @ x.T).trace(F32).lower(lowering_platforms=("cpu",))
    return _compiles("stablehlo", str(lowered.compiler_ir("stablehlo")).encode(), bench)


def _nki(bench: Bench) -> str:
    return f"nki {detect.package_version('nki')} can be imported; Octavo calls none of its kernels"


PROBES: tuple[Entry, ...] = tuple(
    (f"probe: {question}", check, needs, False)
    for question, check, needs in (
        ("64-bit ids as jax writes them", _raw("ids", lambda x: x * 2 + 1), "compiler"),
        ("calls as jax writes them", _raw("calls", _called), "compiler"),
        ("ranks of a collective as jax lists them", _device_list, "compiler"),
        ("top-k as jax writes it", _raw("top_k", lambda x: jax.lax.top_k(x, 8)), "compiler"),
        ("reduce by `and`", _raw("reduce_and", lambda x: jnp.all(x > 0, axis=1)), "compiler"),
        ("reduce by `or`", _raw("reduce_or", lambda x: jnp.any(x > 0, axis=1)), "compiler"),
        ("StableHLO as input", _stablehlo, "compiler"),
        ("AWS's kernel language", _nki, 1),
    )
)
