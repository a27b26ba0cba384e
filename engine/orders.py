"""What the leader of several hosts tells the others, and what they answer. No jax here.

Before the first step: Hello, Welcome, Memory both ways, Built. Then one Order a step, or two where
sampling needs what the host builds while the forward pass runs. Nothing else crosses in a step.
"""

import msgspec
import numpy as np

BLOCK = 64  # numbers of a plan that travel together, or not at all where they are zeros
NO_FORWARD, FORWARD, SEVERAL = 0, 1, 2
NO_SAMPLING, GREEDY, SAMPLE, MASKED, RICH = 0, 1, 2, 3, 4


class Order(msgspec.Struct, tag=0, array_like=True, omit_defaults=True):
    """The programs to run next, in the order of the fields, and the arrays that they take."""

    step: int  # counts up by one; who misses one cannot go on
    forward: int = NO_FORWARD
    sampling: int = NO_SAMPLING
    rows: int = 0  # R bucket
    tokens: int = 0  # T bucket
    context: int = 0  # pages that attention looks at; 0 is all
    edit: bool = False  # before the forward pass
    empty: bool = False  # an empty state in place of this one, and nothing else
    scored: bool = False
    plan: bytes = b""  # i32[data, plan_size]; this and the next on the wire as `thin` makes them
    targets: bytes = b""  # i32[data, 2, T]
    named_chunks: bytes = b""  # i32[data, C, MAX_LOGPROB_TOKEN_IDS]
    mask: bytes = b""  # u32[data, R, words]
    named_rows: bytes = b""  # i32[data, R, MAX_LOGPROB_TOKEN_IDS]


class Hello(msgspec.Struct, tag=1, array_like=True):
    """A host is there."""

    index: int
    facts: dict[str, str]  # what must be equal everywhere: versions and settings, by name


class Welcome(msgspec.Struct, tag=2, array_like=True):
    """Every host is there, and they agree."""


class Memory(msgspec.Struct, tag=3, array_like=True):
    """Bytes that an engine may take on a device of this host; back, on every host."""

    limit: int


class Built(msgspec.Struct, tag=4, array_like=True):
    """Weights and programs are in place; `digest` is of all that decides the programs."""

    digest: str


class Trouble(msgspec.Struct, tag=5, array_like=True):
    """This host cannot go on, and why."""

    message: str


class Stop(msgspec.Struct, tag=6, array_like=True):
    """The leader ends; `message` is why, where it is no clean end."""

    message: str = ""


class Bye(msgspec.Struct, tag=7, array_like=True):
    """The host ends because it was told to."""


class Probe(msgspec.Struct, tag=8, array_like=True):
    """Says nothing: only whether it can be sent matters."""


FromLeader = Order | Welcome | Memory | Stop | Probe
FromFollower = Hello | Memory | Built | Trouble | Bye


ARRAYS = ("plan", "targets", "named_chunks", "mask", "named_rows")


def thinned(order: Order) -> Order:
    """The order as it travels; a copy where it carries arrays."""
    carried = {name: thin(array) for name in ARRAYS if (array := getattr(order, name))}
    return msgspec.structs.replace(order, **carried) if carried else order


def thickened(order: Order) -> Order:
    """The order as it was before it travelled."""
    carried = {name: thick(array) for name in ARRAYS if (array := getattr(order, name))}
    return msgspec.structs.replace(order, **carried) if carried else order


def thin(array: bytes) -> bytes:
    """An array of 32-bit numbers without its blocks of zeros, which are most of a plan."""
    numbers = np.frombuffer(array, "<i4")
    blocks = np.pad(numbers, (0, -len(numbers) % BLOCK)).reshape(-1, BLOCK)
    kept = blocks.any(axis=1)
    head = np.array([len(numbers)], "<i4").tobytes()
    return head + np.packbits(kept).tobytes() + blocks[kept].tobytes()


def thick(packed: bytes) -> bytes:
    """What `thin` was given."""
    count = int(np.frombuffer(packed, "<i4", 1)[0])
    blocks = -(-count // BLOCK)
    bits = -(-blocks // 8)
    kept = np.unpackbits(np.frombuffer(packed, np.uint8, bits, 4), count=blocks).astype(bool)
    numbers = np.zeros((blocks, BLOCK), "<i4")
    numbers[kept] = np.frombuffer(packed[4 + bits :], "<i4").reshape(-1, BLOCK)
    return numbers.reshape(-1)[:count].tobytes()
