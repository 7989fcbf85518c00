"""TensorBoard's event files: records of protocol buffers, each framed by its length and checksums.

Written here, not by TensorBoard's package or a copy of it: those import PyTorch where it is installed, which takes
seconds at the start of every run.

Source: TensorFlow's core/util/event.proto and core/framework/summary.proto (fields), core/lib/io/record_writer.h
(frames); RFC 3720 (CRC-32C).
"""

from __future__ import annotations

import os
import socket
import struct
import time
from pathlib import Path

from parallel.common.protobuf_wire import field

_FIXED64, _FIXED32 = 1, 5
_START = 1  # SessionLog.Status


class EventFile:
    """A new event file in a folder; not closed, what was added last may be missing.

    Args:
        directory: made if there is none.
        purge_step: what earlier files say of this and later steps is not shown.

    Raises:
        OSError: it cannot be written; so do all methods.
    """

    def __init__(self, directory: Path, purge_step: int) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}.{os.urandom(3).hex()}"
        self._file = open(directory / name, "wb")  # noqa: SIM115
        self._write(field(3, b"brain.Event:2"))
        self._write(field(2, purge_step) + field(7, field(1, _START)))
        self.flush()

    def add(self, step: int, values: dict[str, float]) -> None:
        """Adds scalars of a step, as float32."""
        for name, value in values.items():
            scalar = field(1, name.encode()) + _fixed(2, _FIXED32, "<f", value)
            self._write(field(2, step) + field(5, field(1, scalar)))

    def flush(self) -> None:
        """Hands everything to the operating system."""
        self._file.flush()

    def close(self) -> None:
        """Ends the file."""
        self._file.close()

    def _write(self, event: bytes) -> None:
        event = _fixed(1, _FIXED64, "<d", time.time()) + event
        head = struct.pack("<Q", len(event))
        self._file.write(head + _checksum(head) + event + _checksum(event))


def _fixed(number: int, kind: int, form: str, value: float) -> bytes:
    return bytes([number << 3 | kind]) + struct.pack(form, value)


def _table() -> tuple[int, ...]:
    """CRC-32C of every byte: Castagnoli's polynomial, bits reflected."""
    values = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        values.append(value)
    return tuple(values)


_TABLE = _table()


def _checksum(data: bytes) -> bytes:
    """CRC-32C, rotated and offset so that a checksum of data with checksums in it is none by chance."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _TABLE[(crc ^ byte) & 0xFF]
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)
