"""Protocol-buffer bytes without a schema: a message is a list of numbered fields.

An HloModuleProto is read, changed in a few known fields and written again; what is not known here
goes through untouched. Wire types: 0 varint, 1 eight bytes, 2 length-delimited, 5 four bytes.
"""

import struct
from collections.abc import Iterable, Iterator

Value = int | bytes  # int for wire types 0, 1 and 5; bytes for 2


class WireError(ValueError):
    """Bytes that are no protocol-buffer message."""


class Message:
    """One message, its fields in the order they came."""

    __slots__ = ("fields",)

    def __init__(self, fields: list[tuple[int, int, Value]] | None = None) -> None:
        self.fields = fields if fields is not None else []  # (number, wire type, value)

    @staticmethod
    def parse(data: bytes) -> "Message":
        """Read one level; sub-messages stay bytes. Raises WireError."""
        return Message(list(_fields(data)))

    def encode(self) -> bytes:
        """The bytes; the same for the same fields."""
        out = bytearray()
        for number, kind, value in self.fields:
            _put_varint(out, number << 3 | kind)
            if isinstance(value, bytes):
                _put_varint(out, len(value))
                out += value
            elif kind == 0:
                _put_varint(out, value)
            else:
                out += value.to_bytes(8 if kind == 1 else 4, "little")
        return bytes(out)

    def all(self, number: int) -> list[bytes]:
        """Every value of a length-delimited field."""
        return [v for n, _, v in self.fields if n == number and isinstance(v, bytes)]

    def blob(self, number: int) -> bytes:
        """The last value of a length-delimited field; empty where it is absent."""
        values = self.all(number)
        return values[-1] if values else b""

    def text(self, number: int) -> str:
        """A string field."""
        return self.blob(number).decode()

    def message(self, number: int) -> "Message":
        """A sub-message; empty where it is absent."""
        return Message.parse(self.blob(number))

    def number(self, number: int) -> int:
        """A signed integer field; 0 where it is absent."""
        values = [v for n, _, v in self.fields if n == number and isinstance(v, int)]
        return _signed(values[-1]) if values else 0

    def ints(self, number: int) -> list[int]:
        """A repeated integer field, packed or not."""
        out: list[int] = []
        for n, kind, value in self.fields:
            if n != number:
                continue
            if isinstance(value, int) and kind == 0:
                out.append(_signed(value))
            elif isinstance(value, bytes):
                out += unpack_varints(value)
        return out

    def has(self, number: int) -> bool:
        """Whether the field is there."""
        return any(n == number for n, _, _ in self.fields)

    def drop(self, *numbers: int) -> None:
        """Remove fields."""
        self.fields = [field for field in self.fields if field[0] not in numbers]

    def put(self, number: int, value: "int | str | bytes | Message") -> None:
        """Replace a field by one value; an integer 0 is the absence of the field."""
        self.drop(number)
        self.add(number, value)

    def add(self, number: int, value: "int | str | bytes | Message") -> None:
        """Append one value to a repeated field."""
        if isinstance(value, int):
            if value:
                self.fields.append((number, 0, value & (1 << 64) - 1))
            return
        if isinstance(value, Message):
            value = value.encode()
        self.fields.append((number, 2, value.encode() if isinstance(value, str) else value))

    def put_ints(self, number: int, values: Iterable[int]) -> None:
        """Replace a repeated integer field, packed."""
        self.drop(number)
        packed = bytearray()
        for value in values:
            _put_varint(packed, value & (1 << 64) - 1)
        if packed:
            self.fields.append((number, 2, bytes(packed)))


def unpack_varints(data: bytes) -> list[int]:
    """Signed integers, one behind another."""
    out, at = [], 0
    while at < len(data):
        value, at = _varint(data, at)
        out.append(_signed(value))
    return out


def unpack_floats(data: bytes) -> Iterator[float]:
    """float32 numbers, one behind another."""
    return (value for (value,) in struct.iter_unpack("<f", data))


def _fields(data: bytes) -> Iterator[tuple[int, int, Value]]:
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield key >> 3, kind, value
            continue
        if kind == 2:
            size, at = _varint(data, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise WireError(f"wire type {kind} at byte {at} is none that a message has")
        if at + size > len(data):
            raise WireError(f"a field of {size} bytes at byte {at} ends after the message")
        part = data[at : at + size]
        at += size
        yield key >> 3, kind, part if kind == 2 else int.from_bytes(part, "little")


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise WireError(f"a number at byte {at} has no end")
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7


def _put_varint(out: bytearray, value: int) -> None:
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value
