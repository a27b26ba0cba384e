"""What is known of each kind of TPU: published figures, and what its compiler says.

Rates are those of one device as jax counts them: a chip, but on tpu7x one of its two cores. Clocks
are in no data sheet: they are what makes the compiler's matrix instructions a second the published
arithmetic. Memory is what libtpu lets one program use, some less than what the chip has.
"""

from dataclasses import dataclass

GB = 10**9
GiB = 1 << 30


@dataclass(frozen=True)
class Chip:
    """One kind of TPU; figures of one device."""

    name: str
    kind: str  # jax's device_kind
    memory: int  # bytes of HBM that programs may use
    bandwidth: float  # bytes of HBM a second
    flops: float  # bfloat16 a second
    hertz: float
    topologies: tuple[str, ...]  # the chips along each axis, of what can be had
    devices: int = 1  # of a chip
    columns: int = 0  # of the blocks in which a loop over layers reads matrices in place; 0: whole


FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
DEEP = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")

CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", "TPU v5 lite", int(15.75 * GiB), 819 * GB, 197e12, 1.5e9, FLAT),
        Chip("v5p", "TPU v5", int(95.74 * GiB), 2765 * GB, 459e12, 1.75e9, DEEP),
        Chip("v6e", "TPU v6 lite", int(31.25 * GiB), 1640 * GB, 918e12, 1.75e9, FLAT),
        Chip(
            name="tpu7x",
            kind="TPU7x",
            memory=int(94.75 * GiB),
            bandwidth=3690 * GB,
            flops=1153.5e12,
            hertz=2.2e9,
            topologies=("1x1x1", *DEEP),
            devices=2,
            columns=128,
        ),
    )
}


def chip_of(kind: str) -> Chip | None:
    """The chip that jax calls `kind`; None where it is not known here."""
    return next((chip for chip in CHIPS.values() if chip.kind == kind), None)
