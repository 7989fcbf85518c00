"""Digests of what is written, checked when it is read, so that no changed byte passes for what was written.

- JSON objects: `files.write_json` and `files.read_json` themselves; the digest is a key of the object.
- Any file as a whole (`file_crc32`); `summed_write` puts the checksum at the end, behind what other readers look at.
- Files that are mapped and read here and there (`block_crc32`, `CheckedRows`): a checksum for every block, compared
  when a block is first touched, so that opening a large file costs nothing.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from parallel.common.errors import UserError
from parallel.common.files import atomic_write

BLOCK_BYTES = 1 << 20
_CHUNK = 1 << 22
_MARK = b"CR32"
_TRAILER_BYTES = 8


def file_crc32(path: str | Path, nbytes: int | None = None) -> int:
    """CRC-32 of a file, or of its first `nbytes`."""
    found, left = 0, nbytes if nbytes is not None else 1 << 62
    with open(path, "rb") as file:
        while left > 0 and (data := file.read(min(_CHUNK, left))):
            found, left = zlib.crc32(data, found), left - len(data)
    return found


def check_file(path: str | Path, crc32: int | None, *, hint: str = "make it anew", nbytes: int | None = None) -> None:
    """Compares a file (or its first `nbytes`) with its checksum; None is not compared.

    Raises:
        UserError: it has changed or cannot be read.
    """
    try:
        changed = crc32 is not None and file_crc32(path, nbytes) != crc32
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", where=path) from None
    if changed:
        raise UserError("file is damaged: its data have changed since they were written", where=path, hint=hint)


class _Summed:
    """A file whose checksum is kept while it is written."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.crc32 = file, 0

    def write(self, data: bytes | memoryview) -> int:
        self.crc32 = zlib.crc32(data, self.crc32)
        return self.file.write(data)


@contextmanager
def summed_write(path: str | Path) -> Iterator[_Summed]:
    """`atomic_write` of bytes with their CRC-32 in the last 8 bytes of the file; `np.load` and maps do not mind it."""
    with atomic_write(path, "wb") as file:
        summed = _Summed(file)
        yield summed
        file.write(_MARK + summed.crc32.to_bytes(4, "little"))


def check_summed(path: str | Path, hint: str = "make it anew") -> None:
    """Compares a file that `summed_write` wrote with its checksum.

    Raises:
        UserError: it has changed, is cut off, or cannot be read.
    """
    try:
        size = os.path.getsize(path) - _TRAILER_BYTES
        with open(path, "rb") as file:
            file.seek(max(0, size))
            trailer = file.read()
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", where=path) from None
    if size < 0 or not trailer.startswith(_MARK):
        raise UserError("file is damaged: its end is missing", where=path, hint=hint)
    check_file(path, int.from_bytes(trailer[len(_MARK):], "little"), hint=hint, nbytes=size)


def save_array(path: str | Path, array: np.ndarray) -> None:
    """`np.save` with a checksum."""
    with summed_write(path) as file:
        np.save(file, array, allow_pickle=False)


def load_array(path: str | Path, hint: str = "make it anew") -> np.ndarray:
    """What `save_array` wrote.

    Raises:
        UserError: it has changed, is cut off, or cannot be read.
    """
    check_summed(path, hint)
    return np.load(path, allow_pickle=False)


class BlockSums:
    """Checksums of the blocks of a file that grows by `add`, as `block_crc32` gives them; keeps one number a block."""

    def __init__(self) -> None:
        self._done: list[int] = []
        self._open, self._length = 0, 0

    def add(self, data: bytes | memoryview) -> None:
        """Goes on with the next bytes of the file."""
        view = memoryview(data).cast("B")
        while len(view):
            part = view[:BLOCK_BYTES - self._length]
            self._open, self._length = zlib.crc32(part, self._open), self._length + len(part)
            view = view[len(part):]
            if self._length == BLOCK_BYTES:
                self._done.append(self._open)
                self._open, self._length = 0, 0

    def sums(self) -> list[int]:
        """One CRC-32 for every block, the last one shorter."""
        return [*self._done, self._open] if self._length else list(self._done)


def block_crc32(path: str | Path) -> list[int]:
    """CRC-32 of every block of `BLOCK_BYTES` of a file."""
    sums = BlockSums()
    with open(path, "rb") as file:
        while data := file.read(BLOCK_BYTES):
            sums.add(data)
    return sums.sums()


class CheckedRows:
    """Rows of a mapped array whose blocks are compared with their checksums when they are first read by index or slice.

    Args:
        array: mapped from `path`, rows along its first dimension.
        sums: of the file's blocks (`block_crc32`); None: written by a version without, not compared.
        path: for the message.
        hint: what to do about damage.
    """

    def __init__(self, array: np.ndarray, sums: list[int] | None, path: str | Path, hint: str = "make it anew") -> None:
        self.array, self.path, self.hint = array, path, hint
        self.row_bytes = array.dtype.itemsize * int(np.prod(array.shape[1:], dtype=np.int64))
        blocks = -(-array.nbytes // BLOCK_BYTES)
        if sums is not None and len(sums) != blocks:
            raise UserError("file is damaged: it has another number of blocks", where=path, hint=hint)
        self._sums, self._unread = sums, np.ones(blocks, bool)
        self._left = blocks if sums is not None and self.row_bytes else 0
        self.shape, self.dtype, self.ndim = array.shape, array.dtype, array.ndim

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, key: Any) -> Any:
        if self._left:
            rows = key[0] if isinstance(key, tuple) else key
            if isinstance(rows, np.ndarray) and rows.dtype == bool:
                rows = np.flatnonzero(rows)
            if not isinstance(rows, slice):
                rows = np.atleast_1d(np.asarray(rows, np.int64)).reshape(-1)
                rows = np.where(rows < 0, rows + len(self), rows)
            self.check(rows)
        return self.array[key]

    def __getattr__(self, name: str) -> Any:
        """Anything else that an array has, of the full array."""
        if name.startswith("_") or name == "array":
            raise AttributeError(name)
        self.check(slice(None))
        return getattr(self.array, name)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        self.check(slice(None))
        return np.array(self.array, dtype) if copy else np.asarray(self.array, dtype)

    def check(self, rows: np.ndarray | slice) -> None:
        """Compares the blocks that `rows` (numbers, or a slice with step 1) are in and that were not read before.

        Raises:
            UserError: a block has changed.
        """
        if not self._left:
            return
        if isinstance(rows, slice):
            start, stop, _ = rows.indices(len(self.array))
            blocks = np.arange(start * self.row_bytes // BLOCK_BYTES, -(-stop * self.row_bytes // BLOCK_BYTES))
        else:
            rows = np.asarray(rows, np.int64)
            first = rows * self.row_bytes // BLOCK_BYTES
            last = ((rows + 1) * self.row_bytes - 1) // BLOCK_BYTES
            blocks = np.unique(np.concatenate([first, last]))
            if self.row_bytes > BLOCK_BYTES:
                blocks = np.unique(np.concatenate([np.arange(a, b + 1) for a, b in zip(first, last, strict=True)]))
        for block in blocks[self._unread[blocks]] if len(blocks) else ():
            self._check_block(int(block))

    def _check_block(self, block: int) -> None:
        data = memoryview(self.array.reshape(-1).view(np.uint8))[block * BLOCK_BYTES:(block + 1) * BLOCK_BYTES]
        if zlib.crc32(data) != self._sums[block]:
            raise UserError(f"file is damaged: block {block} has changed since it was written", where=self.path,
                            hint=self.hint)
        self._unread[block] = False
        self._left -= 1
