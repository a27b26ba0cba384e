"""`--mesh auto`: how many devices one model gets, and why.

The fewest on which a shard of the weights takes at most half of a device's usable memory, so that
the cache has as much: every further device would add two totals a layer to each step for it.
A model so small that a device holds it many times over gets a copy on every device: nothing of a
copy's step waits for another device, and each brings all of its cache. Between the two the other
devices are left alone, for whoever sets `data` or starts another server.
Devices that share one memory gain nothing from either, and get none.
"""

from collections.abc import Mapping
from typing import Any

from octavo.backends.record import Backend
from octavo.engine.config import EngineConfig, parse_mesh
from octavo.engine.mesh import shards_of
from octavo.models.config import ModelConfig
from octavo.models.load import param_bytes
from octavo.models.registry import build
from octavo.models.shards import Shards, copies, fits

SHARE = 0.5  # of a device's usable memory, the most that weights should take
MANY = 8  # times that a device holds the weights of a model that is copied


def sizes_of(
    config: EngineConfig, backend: Backend, facts: ModelConfig, dtype: Any, limit: int
) -> tuple[Mapping[str, int], str]:
    """The sizes of the mesh, and a line for people: empty where one device is all that was asked.

    limit: bytes of one device. Raises ConfigError.
    """
    if config.mesh == "auto":
        devices = max(1, len(backend.devices))
        if config.hosts != 1:
            sizes: Mapping[str, int] = {"model": devices}
            why = f"auto: every device of {config.hosts} hosts"
            return sizes, _describe(sizes, facts, why)
        if backend.shared_memory and devices > 1:
            return {}, "one device (auto: all have the same memory)"
        sizes, why = _choose(facts, dtype, devices, int(limit * config.memory_utilization))
        return sizes, _describe(sizes, facts, why)
    sizes = parse_mesh(config.mesh)
    return sizes, _describe(sizes, facts, "")


def _choose(
    facts: ModelConfig, dtype: Any, devices: int, usable: int
) -> tuple[Mapping[str, int], str]:
    """The fewest devices that leave enough room, else the most that the model can be cut for.

    All of them where it is copied.
    """
    chosen = share = 0.0
    for n in range(1, devices + 1):
        if not fits(facts, n):
            continue
        model = build(facts, facts.max_len, Shards(model=n))
        chosen, share = n, param_bytes(model, dtype) / max(1, usable)
        if share <= SHARE:
            break
    n = int(chosen)
    if n == 1 and devices > 1 and share * MANY <= 1:
        return {"data": devices}, (
            f"auto: a copy on each of {devices} devices; weights take {share:.1%} of its memory"
        )
    what = "fewest" if share <= SHARE else "most"
    why = (
        f"auto: the {what} of {devices} that the model can be cut for; "
        f"weights take {share:.0%} of the memory of each"
    )
    return ({} if n == 1 else {"model": n}), why


def _describe(sizes: Mapping[str, int], facts: ModelConfig, why: str) -> str:
    shards = shards_of(sizes)
    if all(n == 1 for n in sizes.values()):
        return f"one device ({why})" if why else ""
    parts = [", ".join(f"{axis}={n}" for axis, n in sizes.items())]
    if shards.stage > 1:
        parts.append(f"{facts.L // shards.stage} layers in each stage")
    if (times := copies(facts, shards)) > 1:
        parts.append(f"each key-value head on {times} devices")
    return "; ".join(parts) + (f" ({why})" if why else "")
