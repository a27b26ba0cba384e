"""What the chips of AWS Neuron are and can do, one record a target; no jax.

The figures are AWS's documented ones. `tensor_parallel` are the numbers of cores whose links AWS
documents as usable together; 12 on Inferentia2 stands in one of its pages only.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from octavo.backends.neuron.errors import (
    HeadsNotDivisible,
    SequenceExceedsBuckets,
    TooManyGraphs,
    UnknownTarget,
    UnsupportedDtype,
    UnsupportedTP,
    X64Enabled,
)

GiB = 1 << 30
USABLE = 0.92  # of a core's memory: the rest is the runtime's own, and scratch
# Each is a compile of minutes, and its code lies in the core's memory. The defaults make 19;
# one more bucket of rows and of tokens, 28.
MOST_GRAPHS = 36
MOST_COMMUNICATORS = 16  # different groups of ranks in one graph

FLOATS = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Target:
    """One kind of chip, as the compiler names it."""

    name: str  # of --target
    chip: str
    families: tuple[int, ...]  # of nrt_get_instance_info
    kinds: tuple[str, ...]  # device_kind of jax
    instances: tuple[str, ...]  # how the names of its EC2 instances begin
    cores_per_chip: int  # as the runtime counts them by default
    memory: int  # bytes of one such core
    tensor_parallel: tuple[int, ...]
    lnc: tuple[int, ...]  # physical cores that may act as one; the first is the default
    fp8: tuple[str, ...]
    int64: bool  # in the hardware; Octavo's graphs have none
    nki: bool  # AWS's kernels may be called; Octavo's graphs call none

    @property
    def usable(self) -> int:
        """Bytes of one core that weights, cache and steps may take."""
        return int(self.memory * USABLE)


TARGETS: Mapping[str, Target] = {
    target.name: target
    for target in (
        Target(
            name="inf2",
            chip="Inferentia2",
            families=(4, 7),
            kinds=("NC_v2",),
            instances=("inf2.",),
            cores_per_chip=2,
            memory=16 * GiB,
            tensor_parallel=(1, 2, 4, 8, 12, 24),
            lnc=(1,),
            fp8=("float8_e4m3", "float8_e5m2"),
            int64=False,
            nki=False,
        ),
        Target(
            name="trn1",
            chip="Trainium1",
            families=(2, 3),
            kinds=("NC_v2",),
            instances=("trn1.", "trn1n."),
            cores_per_chip=2,
            memory=16 * GiB,
            tensor_parallel=(1, 2, 8, 16, 32),
            lnc=(1,),
            fp8=("float8_e4m3", "float8_e5m2"),
            int64=False,
            nki=False,
        ),
        Target(
            name="trn2",
            chip="Trainium2",
            families=(5, 6, 8, 9, 10, 11, 12, 13),
            kinds=("NC_v3d", "NC_v3"),
            instances=("trn2.", "trn2u.", "trn2n."),
            cores_per_chip=4,
            memory=24 * GiB,
            tensor_parallel=(1, 2, 4, 8, 16, 32, 64),
            lnc=(2, 1),
            fp8=("float8_e4m3", "float8_e5m2"),
            int64=True,
            nki=True,
        ),
        Target(
            name="trn3",
            chip="Trainium3",
            families=(14, 15),
            kinds=("NC_v4d", "NC_v4"),
            instances=("trn3.",),
            cores_per_chip=4,
            memory=36 * GiB,
            tensor_parallel=(1, 2, 4, 8, 16, 32, 64),
            lnc=(2, 1),
            fp8=("float8_e4m3", "float8_e4m3fn", "float8_e5m2"),
            int64=True,
            nki=True,
        ),
    )
}

# What no target has; the exporter's rules forbid the operations that would need them.
CAPABILITIES: Mapping[str, bool | int | str] = {
    "pallas": False,
    "dynamic_shapes": False,
    "conditional": False,
    "dynamic_while": False,
    "variadic_reduce": False,
    "sort": False,
    "integer_dot": False,
    "integer_collectives": False,
    "x64": False,
    "callbacks": False,
    "dlpack": False,
    "donation": "probed",  # octavo doctor neuron
    "mixed_steps": False,  # prompts and decoding in one program
    "communicators": MOST_COMMUNICATORS,
}


def target_of(name: str) -> Target:
    """The target of that name. Raises UnknownTarget."""
    if name not in TARGETS:
        raise UnknownTarget(name, tuple(TARGETS))
    return TARGETS[name]


def of_family(family: int) -> Target | None:
    """The target whose instances the runtime gives this number, or None."""
    return next((t for t in TARGETS.values() if family in t.families), None)


def of_instance(product: str) -> Target | None:
    """The target of an EC2 instance type such as inf2.xlarge, or None."""
    return next((t for t in TARGETS.values() if product.startswith(t.instances)), None)


def check_parallel(target: Target, cores: int, heads: int) -> None:
    """Raises UnsupportedTP or HeadsNotDivisible where `heads` cannot be dealt to `cores`."""
    if cores not in target.tensor_parallel:
        raise UnsupportedTP(target.name, cores, target.tensor_parallel)
    if heads % cores:
        fitting = tuple(n for n in target.tensor_parallel if heads % n == 0)
        raise HeadsNotDivisible(heads, cores, fitting)


def check_dtype(target: Target, dtype: str, field: str = "dtype") -> None:
    """Raises UnsupportedDtype where the target has no such type, under numpy's name of it."""
    if dtype not in (*FLOATS, *target.fp8):
        raise UnsupportedDtype(field, dtype, target.name, FLOATS)


def check_x64(enabled: bool) -> None:
    """Raises X64Enabled: 64-bit types have no place in a graph."""
    if enabled:
        raise X64Enabled


def check_graphs(names: Sequence[str], most: int = MOST_GRAPHS) -> None:
    """Raises TooManyGraphs where more would be compiled than anybody waits for."""
    if len(names) > most:
        raise TooManyGraphs(len(names), most)


def check_length(length: int, buckets: Sequence[int]) -> None:
    """Raises SequenceExceedsBuckets where no graph sees so long a context."""
    if length > max(buckets):
        raise SequenceExceedsBuckets(length, max(buckets))
