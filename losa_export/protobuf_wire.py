"""The wire format of protobuf messages: as much as it takes to walk through a model file, and to change small parts.

https://protobuf.dev/programming-guides/encoding/
"""

from __future__ import annotations

from collections.abc import Iterator

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5

Field = tuple[int, int | memoryview]  # number and value: an int, or the bytes of a string or message


def fields(message: memoryview) -> Iterator[Field]:
    """The fields of one message, fixed-size ones skipped. Raises: ValueError where it breaks off."""
    for number, value, _ in raw_fields(message):
        if value is not None:
            yield number, value


def raw_fields(message: memoryview) -> Iterator[tuple[int, int | memoryview | None, memoryview]]:
    """Number, value and whole encoding of each field; the value of a fixed-size one is None.

    Raises: ValueError where it breaks off.
    """
    position, end = 0, len(message)
    while position < end:
        start = position
        value: int | memoryview | None
        key, position = _varint(message, position)
        number, wire = key >> 3, key & 7
        if wire == VARINT:
            value, position = _varint(message, position)
        elif wire == BYTES:
            length, position = _varint(message, position)
            if length > end - position:
                raise ValueError(f"a field of {length} bytes breaks off: the file is truncated")
            value = message[position : position + length]
            position += length
        elif wire in (FIXED64, FIXED32):
            value = None
            position += 8 if wire == FIXED64 else 4
            if position > end:
                raise ValueError("a number breaks off: the file is truncated")
        else:
            raise ValueError(f"wire type {wire} is unknown")
        yield number, value, message[start:position]


def text(found: list[Field], number: int) -> str:
    """The last string of that number, as protobuf reads it; '' if there is none. Raises: ValueError if it is none."""
    for one, value in reversed(found):
        if one == number:
            return bytes(as_bytes(value)).decode("utf-8")  # UnicodeDecodeError is a ValueError
    return ""


def texts(found: list[Field], number: int) -> tuple[str, ...]:
    """All strings of that number. Raises: ValueError if one is none."""
    return tuple(bytes(as_bytes(value)).decode("utf-8") for one, value in found if one == number)


def as_bytes(value: int | memoryview | None) -> memoryview:
    """A string or message. Raises: ValueError for a number."""
    if not isinstance(value, memoryview):
        raise ValueError("a number stands where a message should")
    return value


def message_field(number: int, content: bytes) -> bytes:
    """A message or string as a field."""
    return _encoded(number << 3 | BYTES) + _encoded(len(content)) + content


def number_field(number: int, value: int) -> bytes:
    """A whole number, not negative, as a field."""
    return _encoded(number << 3 | VARINT) + _encoded(value)


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    """The number at `position`, seven bits per byte from the lowest, and where the next begins."""
    value = 0
    for count in range(10):
        if position >= len(message):
            raise ValueError("a number breaks off: the file is truncated")
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << (7 * count)
        if byte < 0x80:
            return value, position
    raise ValueError("a number has more than 64 bits")


def _encoded(value: int) -> bytes:
    found = bytearray()
    while value >= 0x80:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    found.append(value)
    return bytes(found)
