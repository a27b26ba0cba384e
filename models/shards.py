"""A model cut over a mesh: how many ways, and which dimension of each weight.

A program sees one shard: the model of `local(config, shards)`, whose heads, feed-forward width,
experts and vocabulary are a part of the whole's. What stands between is `whole(config, shards)`:
the sizes of the parameters as they lie over all shards, with key-value heads repeated until every
shard has one and the vocabulary padded until it divides, a large one into whole lanes.

    checkpoint          whole                      local
    K = 2, model = 8    K = 8, each head 4 times   K = 1
    V = 32001           V = 32768                  V = 4096

`stage` cuts the row of layers: each stage has L / n consecutive ones, and all must be alike, for
every device runs the same program. Their weights are stacked, [L, ...], and the stack is cut.

The axes `expert` and `model` cut attention, dense layers and vocabulary together, in that order;
experts lie whole on `expert`, their width on `model`.
"""

from dataclasses import dataclass, replace

from octavo.models.config import ModelConfig, ModelConfigError
from octavo.models.tensors import Tensor

LANES = 128
SPLIT = ("expert", "model")  # the axes of the mesh that cut one copy of a model's layers
STAGE = "stage"  # and the one that cuts the row of layers


@dataclass(frozen=True)
class Shards:
    """How many ways a model is cut."""

    model: int = 1
    expert: int = 1
    stage: int = 1

    @property
    def count(self) -> int:
        """Shards of attention, dense layers and vocabulary; each in every stage."""
        return self.model * self.expert


ONE = Shards()


def whole(config: ModelConfig, shards: Shards) -> ModelConfig:
    """The sizes of all shards together."""
    n = shards.count
    if n == 1:
        return config
    return replace(config, K=max(config.K, n), V=n * _rows(config.V, n), real_V=config.V)


def _rows(V: int, n: int) -> int:
    """Rows of the vocabulary on each of n shards.

    Whole lanes of a TPU, where that leaves no shard empty: programs that take rows of others apart
    element by element are twice as large, and compile twice as long.
    """
    each = -(-V // n)
    return -(-each // LANES) * LANES if each >= 2 * LANES * n else each


def local(config: ModelConfig, shards: Shards) -> ModelConfig:
    """The sizes of one shard."""
    n = shards.count
    if n == 1:
        return config
    all_ = whole(config, shards)
    return replace(
        all_,
        H=all_.H // n,
        K=all_.K // n,
        F=all_.F // n,
        V=all_.V // n,
        X=all_.X // shards.expert,
        expert_F=all_.expert_F // shards.model,
    )


def check(config: ModelConfig, shards: Shards) -> None:
    """Raise ModelConfigError where the model cannot be cut so."""
    n = shards.count
    if n * shards.stage == 1:
        return
    if config.family == "bert" or not config.generates:
        raise ModelConfigError("models that only read run on one device; leave `mesh` empty")
    if n == 1:
        return
    if shards.expert > 1 and not config.X:
        raise ModelConfigError(
            f"the model has no experts to lie on expert={shards.expert}; use model={n} instead"
        )
    wrong = [
        f"{size:,} {what}"
        for what, size, ways in (
            ("query heads", config.H, n),
            ("feed-forward columns", config.F if _dense(config) else 0, n),
            ("experts", config.X, shards.expert),
            ("columns of an expert", config.expert_F, shards.model),
        )
        if size % ways
    ]
    if config.K % n and n % config.K:
        wrong.append(f"{config.K} key-value heads")
    if wrong:
        sizes = ", ".join(str(m) for m in range(2, 65) if fits(config, m)) or "none"
        raise ModelConfigError(
            f"{' and '.join(wrong)} cannot be cut {n} ways; sizes of `model` that fit: {sizes}"
        )


def _dense(config: ModelConfig) -> bool:
    return not config.X or (bool(config.sparse) and not all(config.sparse))


def fits(config: ModelConfig, n: int) -> bool:
    """Whether `model=n` can cut the model."""
    heads = config.H % n == 0 and (config.K % n == 0 or n % config.K == 0)
    dense = not _dense(config) or config.F % n == 0
    return heads and dense and config.expert_F % n == 0


def copies(config: ModelConfig, shards: Shards) -> int:
    """How often each key-value head is there; more than once where the shards outnumber them."""
    return whole(config, shards).K // config.K


def kept_places(t: Tensor) -> tuple[tuple[str, ...] | str | None, ...]:
    """The axes of the mesh that cut each dimension of a parameter as it is kept."""
    cuts = placed(t.axes)
    if t.flat:
        cuts = (*cuts[: -t.flat], next((cut for cut in cuts[-t.flat :] if cut), None))
    if not t.columns:
        return cuts
    *first, rows, columns = cuts
    return (*first, columns, rows, None)


def placed(axes: str) -> tuple[tuple[str, ...] | str | None, ...]:
    """The same for a dimension per word; `axes` as in tensors.py."""
    words = axes.split()
    if words[:1] == ["L"]:
        return (STAGE, *placed(axes[2:]))
    if "E" in words[:2] and words[-1] == "X":  # the router: every shard chooses for every token
        return (None,) * len(words)
    return tuple(_cut(word) for word in words)


def _cut(word: str) -> tuple[str, ...] | str | None:
    if word in ("K", "HD", "F", "V", "R"):
        return SPLIT
    return {"X": "expert", "f": "model"}.get(word)
