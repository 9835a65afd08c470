"""Reader of protobuf's wire format, as far as XLA's messages need it.

A message is a sequence of fields. A field is a varint with its number and encoding, then its value:
https://protobuf.dev/programming-guides/encoding/. Malformed bytes are refused.
"""

from __future__ import annotations

from collections.abc import Iterator

VARINT, FIXED64, DELIMITED, FIXED32 = 0, 1, 2, 5
FIXED_BYTES = {FIXED64: 8, FIXED32: 4}

# A 64-bit number takes at most ten groups of seven bits.
MAX_VARINT_BYTES = 10
INT64_END = 2**63


class WireError(ValueError):
    """Bytes are malformed, or a field has another type than the one read."""


class Message:
    """Fields of one message by number; each reader expects the type that the schema gives.

    Raises:
      WireError: malformed bytes, or a field of another type than its reader's.
    """

    def __init__(self, data: bytes) -> None:
        self._fields: dict[int, list[int | bytes | None]] = {}
        for number, value in _fields(data):
            self._fields.setdefault(number, []).append(value)

    def integer(self, number: int) -> int:
        """Value of an int64 field that is not negative (a count, size or id); 0 if absent."""
        return _not_negative(number, self._fields.get(number, [0])[-1])

    def flag(self, number: int) -> bool:
        """Value of a bool field; False if absent."""
        return self.integer(number) != 0

    def text(self, number: int) -> str:
        """Value of a string field; empty if absent. Invalid UTF-8 is replaced."""
        return _bytes(number, self._fields.get(number, [b""])[-1]).decode("utf-8", errors="replace")

    def messages(self, number: int) -> list[Message]:
        """Values of a message field, repeated or single."""
        return [Message(_bytes(number, value)) for value in self._fields.get(number, [])]

    def message(self, number: int) -> Message:
        """Value of a message field; an empty message if absent."""
        return (self.messages(number) or [Message(b"")])[-1]

    def integers(self, number: int) -> list[int]:
        """Values of a repeated int64 field, packed or one by one."""
        found = []
        for value in self._fields.get(number, []):
            found += (
                [_not_negative(number, value)]
                if isinstance(value, int)
                else _packed(number, _bytes(number, value))
            )
        return found


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes | None]]:
    """(number, value) of each field.

    The value is an int for varints, bytes for length-delimited fields, None for fixed widths.
    """
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, encoding = key >> 3, key & 7
        if number == 0:
            raise WireError(f"Field numbers must be at least 1, got 0 before byte {at}.")
        if encoding == VARINT:
            value, at = _varint(data, at)
            yield number, value
        elif encoding == DELIMITED:
            length, at = _varint(data, at)
            value, at = _take(data, at, length)
            yield number, value
        elif encoding in FIXED_BYTES:
            _, at = _take(data, at, FIXED_BYTES[encoding])
            yield number, None
        else:
            raise WireError(
                f"Field {number} must have encoding 0, 1, 2 or 5, got {encoding} before byte {at}."
            )


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Unsigned 64-bit varint at `at` (seven bits a byte, lowest first), and the byte after it."""
    value = 0
    for i, byte in enumerate(data[at : at + MAX_VARINT_BYTES]):
        value |= (byte & 0x7F) << (7 * i)
        if byte < 0x80:
            return value & (2**64 - 1), at + i + 1
    raise WireError(
        f"Numbers must end within {MAX_VARINT_BYTES} bytes, got a longer one at byte {at} of "
        f"{len(data)}."
    )


def _take(data: bytes, at: int, length: int) -> tuple[bytes, int]:
    if length > len(data) - at:
        raise WireError(
            f"A field must end within the message, got length {length} at byte {at} of {len(data)}."
        )
    return data[at : at + length], at + length


def _packed(number: int, data: bytes) -> list[int]:
    found, at = [], 0
    while at < len(data):
        value, at = _varint(data, at)
        found.append(_not_negative(number, value))
    return found


def _not_negative(number: int, value: int | bytes | None) -> int:
    if not isinstance(value, int) or value >= INT64_END:
        raise WireError(f"Field {number} must be a number of at least 0, got {_shown(value)}.")
    return value


def _bytes(number: int, value: int | bytes | None) -> bytes:
    if not isinstance(value, bytes):
        raise WireError(f"Field {number} must be bytes, got {_shown(value)}.")
    return value


def _shown(value: int | bytes | None) -> str:
    """Description of a value for a message."""
    if isinstance(value, int):
        return str(value - 2 * INT64_END if value >= INT64_END else value)
    return "a fixed width" if value is None else f"{len(value)} bytes"
