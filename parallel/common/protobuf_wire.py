"""Protocol-buffer wire format, as far as MindSpore's files need it: varints and length-delimited fields.

Source: https://protobuf.dev/programming-guides/encoding/.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import BinaryIO

VARINT, BYTES = 0, 2
_FIXED = {1: 8, 5: 4}


def fields(data: bytes | memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """(field number, value) of a message held in memory.

    Raises:
        ValueError: not a message.
    """
    view, at = memoryview(data), 0
    while at < len(view):
        tag, at = next_varint(view, at)
        number, kind = tag >> 3, tag & 7
        if kind == VARINT:
            value, at = next_varint(view, at)
            yield number, value
            continue
        size = _FIXED.get(kind)
        if size is None:
            if kind != BYTES:
                raise ValueError(f"wire type {kind}")
            size, at = next_varint(view, at)
        if at + size > len(view) or number == 0:
            raise ValueError("truncated")
        yield number, view[at:at + size]
        at += size


def next_varint(view: memoryview, at: int) -> tuple[int, int]:
    """(number, position after it) of the varint at `at`.

    Raises:
        ValueError: truncated.
    """
    value = shift = 0
    while at < len(view) and shift < 70:
        byte = view[at]
        value, shift, at = value | (byte & 0x7F) << shift, shift + 7, at + 1
        if not byte & 0x80:
            return value, at
    raise ValueError("a number is truncated")


def read_varint(file: BinaryIO) -> int | None:
    """The next varint of a file, None at its end.

    Raises:
        ValueError: the file ends within it.
    """
    value = shift = 0
    while byte := file.read(1):
        value, shift = value | (byte[0] & 0x7F) << shift, shift + 7
        if not byte[0] & 0x80:
            return value
        if shift > 63:
            break
    if shift:
        raise ValueError("a number is truncated")
    return None


def signed(value: int) -> int:
    """A varint read as a signed 32- or 64-bit number."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def varint(value: int) -> bytes:
    """A number as a varint; a negative one as its 64-bit two's complement."""
    value &= (1 << 64) - 1
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def field(number: int, value: int | bytes) -> bytes:
    """One field of a message."""
    if isinstance(value, int):
        return varint(number << 3 | VARINT) + varint(value)
    return varint(number << 3 | BYTES) + varint(len(value)) + value


_DIGEST_TAG = varint(1009 << 3 | BYTES) + varint(32)


_HAS_DIGEST = varint(1008 << 3 | VARINT) + varint(1)


def with_digest(data: bytes) -> bytes:
    """A message with the SHA-256 of all before as one more field at its end, and at its beginning a field that says so,
    for a file that is truncated between two fields. Other readers pass over both."""
    data = _HAS_DIGEST + data
    return data + _DIGEST_TAG + hashlib.sha256(data).digest()


def has_changed(data: bytes) -> bool:
    """Whether a message that `with_digest` made is no longer what it was; False for one without a digest."""
    at = max(0, len(data) - len(_DIGEST_TAG) - 32)
    if data[at:at + len(_DIGEST_TAG)] != _DIGEST_TAG:
        return data.startswith(_HAS_DIGEST)
    return hashlib.sha256(data[:at]).digest() != data[-32:]
