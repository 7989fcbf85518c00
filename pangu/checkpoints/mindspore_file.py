"""MindSpore's .ckpt file, read and written parameter by parameter: memory stays at one parameter.

Format (`mindspore/train/checkpoint.proto`): a message of repeated values {1: name, 2: {1: dims, 2: type, 3: data}}; a
large parameter is several values of the same name in a row, each with the full dims.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from parallel.common import protobuf_wire as wire
from parallel.common.errors import UserError
from parallel.common.files import atomic_write

TYPES = {"Float32": "F32", "Float16": "F16", "BFloat16": "BF16", "Float64": "F64", "Int32": "I32", "Int64": "I64",
         "Int8": "I8", "UInt8": "U8", "Bool": "BOOL"}
_NUMPY = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "F64": "<f8", "I32": "<i4", "I64": "<i8", "I8": "|i1",
          "U8": "|u1", "BOOL": "|b1"}
_PIECE = 128 << 20  # bytes of one value; below the 2 GB that a message may hold
_MAX_HEAD = 4096  # name, dims and type of a value, generously


@dataclass
class Entry:
    """Type, shape and position (offset, bytes) of one parameter."""

    dtype: str
    shape: tuple[int, ...]
    pieces: list[tuple[int, int]] = field(default_factory=list)


class MindSporeFile:
    """A .ckpt opened for reading: `entries` by name, `read(name)` gives one parameter.

    Raises:
        UserError: missing, truncated or not such a file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError("no such file", where=path, hint="check the path of the checkpoint")
        self.entries: dict[str, Entry] = {}
        size = self.path.stat().st_size
        try:
            with open(self.path, "rb") as file:
                while (tag := wire.read_varint(file)) is not None:
                    if tag != (1 << 3 | wire.BYTES):
                        if self._is_checksum(file, size):
                            break
                        raise ValueError("another kind of message")
                    length = wire.read_varint(file) or 0
                    begin = file.tell()
                    if begin + length > size:
                        raise ValueError("truncated")
                    self._value(file, begin, length)
                    file.seek(begin + length)
        except (ValueError, UnicodeDecodeError) as error:
            raise UserError(f"not a MindSpore checkpoint, or damaged: {error}", where=self.path) from None
        if not self.entries:
            raise UserError("the checkpoint holds no parameter", where=self.path)

    @staticmethod
    def _is_checksum(file, size: int) -> bool:
        file.seek(max(0, size - 17))
        return file.read(7) == b"crc_num"

    def _value(self, file, begin: int, length: int) -> None:
        """Notes one value without reading its data, which are at its end."""
        at, name, tensor = begin, None, None
        while at < begin + length:
            file.seek(at)
            tag, size = wire.read_varint(file), wire.read_varint(file)
            if tag is None or size is None or tag & 7 != wire.BYTES:
                raise ValueError("a value cannot be read")
            at = file.tell()
            if tag >> 3 == 1:
                name = file.read(min(size, _MAX_HEAD)).decode("utf-8")
            elif tag >> 3 == 2:
                tensor = self._tensor(file, at, size)
            at += size
        if name is None or tensor is None:
            raise ValueError("a value without name or tensor")
        dtype, shape, place = tensor
        entry = self.entries.setdefault(name, Entry(dtype, shape))
        if (entry.dtype, entry.shape) != (dtype, shape):
            raise ValueError(f"the pieces of '{name}' differ")
        entry.pieces.append(place)

    @staticmethod
    def _tensor(file, at: int, length: int) -> tuple[str, tuple[int, ...], tuple[int, int]]:
        end, dims, dtype, place = at + length, [], "", (at, 0)
        while at < end:
            file.seek(at)
            tag = wire.read_varint(file)
            if tag is None:
                raise ValueError("a tensor is truncated")
            if tag & 7 == wire.VARINT:
                dims.append(wire.signed(wire.read_varint(file) or 0))
                at = file.tell()
                continue
            size = wire.read_varint(file) or 0
            at = file.tell()
            if tag >> 3 == 1:  # packed dims
                packed = file.read(min(size, _MAX_HEAD))
                dims += [wire.signed(value) for value in _varints(packed)]
            elif tag >> 3 == 2:
                dtype = file.read(min(size, _MAX_HEAD)).decode("utf-8")
            elif tag >> 3 == 3:
                place = (at, size)
            at += size
        if dtype not in TYPES or min(dims, default=0) < 0:
            raise ValueError(f"a tensor of type '{dtype}' and dims {dims}")
        return TYPES[dtype], tuple(dims), place

    def read(self, name: str) -> np.ndarray:
        """One parameter.

        Raises:
            UserError: no such parameter, or its data do not fill its shape.
        """
        entry = self.entries.get(name)
        if entry is None:
            raise UserError(f"the checkpoint has no parameter '{name}'", where=self.path)
        array = np.empty(entry.shape, _NUMPY[entry.dtype])
        if array.nbytes != sum(size for _, size in entry.pieces):
            raise UserError(f"checkpoint file is damaged: '{name}' has a wrong length", where=self.path)
        view, at = memoryview(array.reshape(-1)).cast("B"), 0
        with open(self.path, "rb") as file:
            for begin, size in entry.pieces:
                file.seek(begin)
                if file.readinto(view[at:at + size]) != size:
                    raise UserError(f"checkpoint file is damaged: it ends within '{name}'", where=self.path)
                at += size
        return array


def _varints(data: bytes) -> list[int]:
    values, value, shift = [], 0, 0
    for byte in data:
        value, shift = value | (byte & 0x7F) << shift, shift + 7
        if not byte & 0x80:
            values.append(value)
            value = shift = 0
    return values


def write_mindspore(path: str | Path,
                    tensors: Iterable[tuple[str, str, tuple[int, ...], Callable[[], np.ndarray]]]) -> None:
    """Writes a .ckpt, atomically.

    Args:
        path: the file.
        tensors: (name, dtype as in safetensors, shape, read() -> array); `read` is called in turn.
    """
    named = {name: theirs for theirs, name in TYPES.items()}
    with atomic_write(path, "wb") as file:
        for name, dtype, shape, read in tensors:
            data = memoryview(np.ascontiguousarray(read(), _NUMPY[dtype]).reshape(-1)).cast("B")
            head = b"".join(wire.field(1, dim) for dim in shape) + wire.field(2, named[dtype].encode())
            tag = wire.field(1, name.encode())
            for begin in range(0, max(len(data), 1), _PIECE):
                piece = data[begin:begin + _PIECE]
                inner = head + wire.varint(3 << 3 | wire.BYTES) + wire.varint(len(piece))
                outer = tag + wire.varint(2 << 3 | wire.BYTES) + wire.varint(len(inner) + len(piece)) + inner
                file.write(wire.varint(1 << 3 | wire.BYTES) + wire.varint(len(outer) + len(piece)) + outer)
                file.write(piece)
