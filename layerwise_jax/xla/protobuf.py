"""Protobuf's wire format, as far as XLA's messages need it: what is not asked for is skipped, what
is broken refused.

A message is a row of fields. A field is a varint that holds its number and one of four encodings,
then its value. The format is described at https://protobuf.dev/programming-guides/encoding/.
"""

from __future__ import annotations

from collections.abc import Iterator

VARINT, FIXED64, DELIMITED, FIXED32 = 0, 1, 2, 5
FIXED_BYTES = {FIXED64: 8, FIXED32: 4}

# A 64-bit number takes at most ten groups of seven bits.
MAX_VARINT_BYTES = 10
INT64_END = 2**63


class WireError(ValueError):
    """The bytes are not the message that they were taken for."""


class Message:
    """The fields of one message by number, each read as the type that the caller knows it to have.

    Raises:
      WireError: from the constructor for bytes that are no message, from a reader for a field of
        another type.
    """

    def __init__(self, data: bytes) -> None:
        self._fields: dict[int, list[int | bytes | None]] = {}
        for number, value in _fields(data):
            self._fields.setdefault(number, []).append(value)

    def integer(self, number: int) -> int:
        """An int64 field of a count, a size or an id, none of which is negative; 0 if absent."""
        return _not_negative(number, self._fields.get(number, [0])[-1])

    def flag(self, number: int) -> bool:
        """A bool field; False if absent."""
        return self.integer(number) != 0

    def text(self, number: int) -> str:
        """A string field; empty if absent. Names are for people, so broken characters are replaced,
        not refused.
        """
        return _bytes(number, self._fields.get(number, [b""])[-1]).decode("utf-8", errors="replace")

    def messages(self, number: int) -> list[Message]:
        """A repeated message field, which a single one is too."""
        return [Message(_bytes(number, value)) for value in self._fields.get(number, [])]

    def message(self, number: int) -> Message:
        """A message field; an empty message if absent."""
        return (self.messages(number) or [Message(b"")])[-1]

    def integers(self, number: int) -> list[int]:
        """A repeated int64 field, packed or one by one."""
        found = []
        for value in self._fields.get(number, []):
            found += (
                [_not_negative(number, value)]
                if isinstance(value, int)
                else _packed(number, _bytes(number, value))
            )
        return found


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes | None]]:
    """(number, value) of each field: an int for a varint, bytes for a length-delimited one, None
    for fixed widths.
    """
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, encoding = key >> 3, key & 7
        if number == 0:
            raise WireError(f"Field number 0 before byte {at}; numbers begin at 1.")
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
                f"Field {number} before byte {at} has encoding {encoding}; 0, 1, 2 and 5 are in "
                "use."
            )


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """An unsigned 64-bit number, seven bits a byte from the lowest, and where it ends."""
    value = 0
    for i, byte in enumerate(data[at : at + MAX_VARINT_BYTES]):
        value |= (byte & 0x7F) << (7 * i)
        if byte < 0x80:
            return value & (2**64 - 1), at + i + 1
    raise WireError(
        f"A number at byte {at} does not end within {MAX_VARINT_BYTES} bytes of {len(data)}."
    )


def _take(data: bytes, at: int, length: int) -> tuple[bytes, int]:
    if length > len(data) - at:
        raise WireError(f"{length} bytes are announced at byte {at}; {len(data) - at} are left.")
    return data[at : at + length], at + length


def _packed(number: int, data: bytes) -> list[int]:
    found, at = [], 0
    while at < len(data):
        value, at = _varint(data, at)
        found.append(_not_negative(number, value))
    return found


def _not_negative(number: int, value: int | bytes | None) -> int:
    if not isinstance(value, int) or value >= INT64_END:
        raise WireError(f"field {number} must be an int of at least 0, got {_shown(value)}.")
    return value


def _bytes(number: int, value: int | bytes | None) -> bytes:
    if not isinstance(value, bytes):
        raise WireError(f"field {number} must be bytes, got {_shown(value)}.")
    return value


def _shown(value: int | bytes | None) -> str:
    """A value in words short enough for a message."""
    if isinstance(value, int):
        return str(value - 2 * INT64_END if value >= INT64_END else value)
    return "of a fixed width" if value is None else f"{len(value)} bytes"
