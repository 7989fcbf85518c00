"""The safetensors format, written tensor by tensor: memory stays at one tensor however large the file.

Format (https://github.com/huggingface/safetensors): 8 bytes little-endian header length, a JSON header
`{name: {dtype, shape, data_offsets}}`, then the raw little-endian data. Files written here are read by the safetensors
package and the other way round.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from parallel.common.errors import UserError
from parallel.common.files import explain_os_error
from parallel.common.structured import parse_object

MAX_HEADER_BYTES = 100 << 20
_BLOCK_BYTES = 16 << 20
DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2",
          "I8": "|i1", "U8": "|u1", "BOOL": "|b1"}
"""Names of the format to NumPy types. BF16, which NumPy lacks, is carried as its 16 bits."""
_NAMES = {np.dtype(code): name for name, code in DTYPES.items() if name != "BF16"}


@dataclass(frozen=True)
class TensorEntry:
    """Position of a tensor in a file: dtype name, shape, first and last byte (counted from the end of the header)."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        return self.stop - self.start


def dtype_name(dtype: np.dtype | type) -> str:
    """Name of a NumPy type in the format.

    Raises:
        UserError: the format has no such type.
    """
    name = _NAMES.get(np.dtype(dtype).newbyteorder("<"))
    if name is None:
        raise UserError("a checkpoint cannot hold this type", value=str(dtype), hint=f"known: {', '.join(DTYPES)}")
    return name


def write_safetensors(path: str | Path, tensors: Iterable[tuple[str, str, tuple[int, ...], Callable[[], np.ndarray]]],
                      metadata: dict[str, str] | None = None) -> dict[str, int]:
    """Writes a file and returns each tensor's CRC-32. Not atomic: write into a folder that is renamed afterwards.

    Args:
        path: the file to write.
        tensors: (name, dtype name, shape, read() -> array); `read` is called once, in order, when its turn comes.
        metadata: strings for the header's `__metadata__`.

    Raises:
        UserError: no space on the disk, or the folder cannot be written.
    """
    tensors = list(tensors)
    try:
        with open(path, "wb") as file:
            file.write(_header(tensors, metadata))
            checksums = {}
            for name, dtype, shape, read in tensors:
                array = np.asarray(read(), DTYPES[dtype], order="C")
                if tuple(array.shape) != tuple(shape):
                    raise ValueError(f"{name}: announced shape {shape}, got {array.shape}")
                data = memoryview(array.reshape(-1)).cast("B") if array.size else memoryview(b"")
                checksums[name] = zlib.crc32(data)
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise explain_os_error(error, path) from error
    return checksums


def _header(tensors: list, metadata: dict[str, str] | None) -> bytes:
    header: dict = {"__metadata__": metadata} if metadata else {}
    start = 0
    for name, dtype, shape, _ in tensors:
        if name in header:
            raise UserError("two parameters have the same name", value=name)
        stop = start + int(np.prod(shape, dtype=np.int64)) * np.dtype(DTYPES[dtype]).itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


class SafetensorsFile:
    """A file opened for reading: `entries` by name, `read(name)` gives one tensor.

    Raises:
        UserError: missing, truncated, or not a safetensors file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError("no such file", where=path, hint="check the path of the checkpoint")
        self.size = self.path.stat().st_size
        self.entries, self._data_start, self.metadata = self._read_header()

    def _damaged(self, what: str) -> UserError:
        return UserError(f"checkpoint file is damaged: {what}", where=self.path, hint="use another checkpoint")

    def _read_header(self) -> tuple[dict[str, TensorEntry], int, dict]:
        with open(self.path, "rb") as file:
            first = file.read(8)
            length = struct.unpack("<Q", first)[0] if len(first) == 8 else 0
            if not 2 <= length <= min(MAX_HEADER_BYTES, self.size - 8):
                raise self._damaged("its header is truncated")
            text = file.read(length)
        try:
            header = parse_object(text, max_bytes=MAX_HEADER_BYTES)
            metadata = header.pop("__metadata__", {})
            entries = {name: TensorEntry(e["dtype"], tuple(int(n) for n in e["shape"]), *map(int, e["data_offsets"]))
                       for name, e in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise self._damaged("its header cannot be read") from None
        for name, entry in entries.items():
            self._check(name, entry, self.size - 8 - length)
        return entries, 8 + length, metadata

    def _check(self, name: str, entry: TensorEntry, available: int) -> None:
        if entry.dtype not in DTYPES or min(entry.shape, default=0) < 0:
            raise self._damaged(f"'{name}' has the unknown type or shape {entry.dtype} {list(entry.shape)}")
        size = int(np.prod(entry.shape, dtype=np.int64)) * np.dtype(DTYPES[entry.dtype]).itemsize
        if not 0 <= entry.start <= entry.stop or entry.nbytes != size:
            raise self._damaged(f"'{name}' has a wrong length")
        if entry.stop > available:
            raise self._damaged(f"it ends within '{name}'")

    def read(self, name: str, crc32: int | None = None) -> np.ndarray:
        """One tensor (a fresh array); checked against `crc32` when given.

        Raises:
            UserError: the file has no such tensor, or its data are damaged.
        """
        entry = self.entries.get(name)
        if entry is None:
            raise UserError(f"the checkpoint has no parameter '{name}'", where=self.path)
        array = np.empty(entry.shape, DTYPES[entry.dtype])
        with open(self.path, "rb") as file:
            file.seek(self._data_start + entry.start)
            view = memoryview(array.reshape(-1)).cast("B") if array.size else memoryview(bytearray())
            if file.readinto(view) != entry.nbytes:
                raise self._damaged(f"it ends within '{name}'")
        if crc32 is not None and zlib.crc32(view) != crc32:
            raise self._damaged(f"the data of '{name}' have changed")
        return array

    def copy_extent(self, name: str, extent: Iterable[tuple[int, int]], into: np.ndarray,
                    index: tuple[slice, ...]) -> None:
        """`into[index] = tensor[extent]`, rows of at most 16 MB at a time."""
        entry, extent = self.entries[name], tuple(extent)
        if not entry.nbytes:
            return
        if not entry.shape:
            into[...] = self.read(name)
            return
        target = into[index]
        row_bytes = entry.nbytes // entry.shape[0]
        rest = tuple(slice(start, stop) for start, stop in extent[1:])
        block = max(1, _BLOCK_BYTES // row_bytes)
        with open(self.path, "rb") as file:
            for first in range(extent[0][0], extent[0][1], block):
                last = min(first + block, extent[0][1])
                file.seek(self._data_start + entry.start + first * row_bytes)
                rows = np.fromfile(file, DTYPES[entry.dtype], (last - first) * row_bytes // into.itemsize)
                if rows.size * into.itemsize != (last - first) * row_bytes:
                    raise self._damaged(f"it ends within '{name}'")
                rows = rows.reshape((last - first, *entry.shape[1:]))
                target[first - extent[0][0]:last - extent[0][0]] = rows[(slice(None), *rest)]

    def map(self, name: str) -> np.ndarray:
        """A tensor as it is in the file, read-only and without reading it into memory."""
        entry = self.entries[name]
        if not entry.nbytes:
            return np.empty(entry.shape, DTYPES[entry.dtype])
        mapped = np.memmap(self.path, DTYPES[entry.dtype], "r", self._data_start + entry.start, entry.shape or (1,))
        return mapped.reshape(entry.shape)

    def check(self, name: str, crc32: int | None) -> None:
        """Compares a tensor's data with its checksum, block by block.

        Raises:
            UserError: the file has no such tensor, or its data have changed.
        """
        entry = self.entries.get(name)
        if entry is None:
            raise UserError(f"the checkpoint has no parameter '{name}'", where=self.path)
        if crc32 is None:
            return
        found, left = 0, entry.nbytes
        with open(self.path, "rb") as file:
            file.seek(self._data_start + entry.start)
            while left:
                data = file.read(min(left, _BLOCK_BYTES))
                if not data:
                    raise self._damaged(f"it ends within '{name}'")
                found, left = zlib.crc32(data, found), left - len(data)
        if found != crc32:
            raise self._damaged(f"the data of '{name}' have changed")

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)
