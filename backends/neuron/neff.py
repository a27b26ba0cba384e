"""The header of a NEFF, the compiler's output: 1,024 bytes before a tar archive.

Read to refuse a file that is cut short or was made for other cores before the runtime sees it.
The layout is the one AWS documents; no jax, no runtime.
"""

import struct
from dataclasses import dataclass

from octavo.backends.neuron.errors import LncMismatch, NeffInvalid

HEADER = 1024
# pkg_version, header_size, data_size, major, minor, build, num_tpb, hash, uuid, name,
# requested_tpb_count, tpb_per_node, feature_bits, lnc_size, pad
_LAYOUT = struct.Struct("<5Q128sI32s16s256sI64sQI")
assert _LAYOUT.size <= HEADER


@dataclass(frozen=True)
class Header:
    """What Octavo looks at."""

    package: int
    data_size: int  # bytes behind the header
    version: tuple[int, int]
    build: str
    cores: int
    name: str
    features: int
    lnc: int  # physical cores in a logical one; 0 where the compiler left it open


def parse(data: bytes, path: object = "the data") -> Header:
    """The header of a whole NEFF. Raises NeffInvalid."""
    if len(data) < HEADER:
        raise NeffInvalid(path, f"it has {len(data):,} bytes, and the header alone has {HEADER:,}")
    package, header_size, size, major, minor, build, cores, _, _, name, _, _, features, lnc = (
        _LAYOUT.unpack_from(data)
    )
    if header_size != HEADER:
        raise NeffInvalid(
            path, f"its header says to be {header_size:,} bytes instead of {HEADER:,}"
        )
    if len(data) - HEADER < size or size == 0:
        raise NeffInvalid(
            path, f"{len(data) - HEADER:,} bytes follow the header instead of {size:,}"
        )
    return Header(package, size, (major, minor), _text(build), cores, _text(name), features, lnc)


def check_lnc(header: Header, graph: str, lnc: int) -> None:
    """Raises LncMismatch where the graph's logical cores are not the runtime's."""
    if header.lnc and header.lnc != lnc:
        raise LncMismatch(graph, header.lnc, lnc)


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode(errors="replace")
