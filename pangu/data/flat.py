"""Packed records as flat files that are mapped from the disk: what a machine without MindSpore trains on.

Beside `train-00000-of-00004.mindrecord` are

    train-00000-of-00004.ids     the same records in the same order: uint16 or int32, [records, sequence_length + 1]
    train-00000-of-00004.ends    int64: positions of the document ends among all ids of the file, ascending

both little-endian without a header; index.json holds their sizes, types and SHA-256 (`FlatFile`).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from pydantic import Field

from parallel.common.digests import BlockSums, CheckedRows
from parallel.common.errors import UserError
from parallel.common.files import inside
from parallel.common.settings import Settings

_CHECKED_BYTES = 64 << 20
_BLOCK_BYTES = 4 << 20
ROWS = 256
REPAIR = "make the records anew with `python -m pangu pack`, or the flat files with `python -m pangu flatten`"


class FlatFile(Settings):
    """The flat form of one file of records, in the index."""

    ids: str
    """Name of the file of ids inside the folder."""
    dtype: Literal["uint16", "int32"]
    """Type of the ids."""
    sha256: str
    """Of the file of ids."""
    ends: str
    """Name of the file of document ends inside the folder."""
    documents: int = Field(ge=0)
    """Document ends in it."""
    ends_sha256: str
    """Of the file of document ends."""
    blocks: list[int] | None = None
    """CRC-32 of every MiB of the file of ids, for files too large to be read at once; null = written without."""


class FlatWriter:
    """Writes the flat form of one file of records.

    Args:
        path: of the records' file; the suffix is replaced.
        record_length: ids of a record.
        vocabulary_size: ids are below it; decides the type.
        eot_id: ends every document.
    """

    def __init__(self, path: str | Path, record_length: int, vocabulary_size: int, eot_id: int) -> None:
        self.path, self.record_length, self.eot_id = Path(path), record_length, eot_id
        self.dtype = "uint16" if vocabulary_size <= 1 << 16 else "int32"
        self.written = self.documents = 0
        self.files: dict[str, IO[bytes]] = {}
        self.digests, self.blocks = {"ids": hashlib.sha256(), "ends": hashlib.sha256()}, BlockSums()

    def add(self, ids_NR: np.ndarray) -> None:
        """Appends records [N, record_length]."""
        flat = ids_NR.reshape(-1)
        ends = np.flatnonzero(flat == self.eot_id).astype("<i8") + self.written
        self._append("ids", flat.astype(np.dtype(self.dtype).newbyteorder("<")))
        self._append("ends", ends)
        self.written, self.documents = self.written + flat.size, self.documents + ends.size

    def _append(self, kind: str, array: np.ndarray) -> None:
        if kind not in self.files:
            self.files[kind] = self.path.with_suffix(f".{kind}").open("wb")
        data = array.tobytes()
        self.files[kind].write(data)
        self.digests[kind].update(data)
        if kind == "ids":
            self.blocks.add(data)

    def finish(self) -> dict[str, Any]:
        """Closes the files; their entry in the index (`FlatFile`)."""
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()
        return {"ids": self.path.with_suffix(".ids").name, "dtype": self.dtype,
                "sha256": self.digests["ids"].hexdigest(), "ends": self.path.with_suffix(".ends").name,
                "documents": self.documents, "ends_sha256": self.digests["ends"].hexdigest(),
                "blocks": self.blocks.sums()}


class FlatRecords:
    """The records of a split, mapped from their flat files.

    Args:
        directory: folder of the records.
        files: entries of the index (`PackedFile`), each with its flat form.
        record_length: ids of a record.

    Raises:
        UserError: a file is missing, truncated or changed (up to 64 MB are read at once, of larger files the blocks
            that are read).
    """

    def __init__(self, directory: str | Path, files: Sequence[Any], record_length: int) -> None:
        self.directory, self.record_length = Path(directory), record_length
        self.parts: list[np.ndarray | CheckedRows] = []
        self.files = list(files)
        for entry in files:
            path, shape = inside(self.directory, entry.flat.ids), (entry.records, record_length)
            dtype = np.dtype(entry.flat.dtype).newbyteorder("<")
            self._check(path, entry.records * record_length * dtype.itemsize, entry.flat.sha256)
            mapped = np.memmap(path, dtype, "r", shape=shape)
            self.parts.append(CheckedRows(mapped, entry.flat.blocks, path, REPAIR) if mapped.nbytes > _CHECKED_BYTES
                              else mapped)
        self.starts = np.cumsum([0, *(entry.records for entry in files)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def read(self, numbers: np.ndarray, rows: int) -> Iterator[np.ndarray]:
        """The records `numbers`, counted through the files, in this order: int32 [rows, record_length] at a time (the
        last may be shorter)."""
        for first in range(0, len(numbers), rows):
            yield self._read(numbers[first:first + rows])

    def _read(self, numbers: np.ndarray) -> np.ndarray:
        found = np.empty((len(numbers), self.record_length), np.int32)
        places = np.searchsorted(self.starts, numbers, side="right") - 1
        for place in np.unique(places):
            chosen = places == place
            found[chosen] = self.parts[place][numbers[chosen] - self.starts[place]]
        return found

    def document_ends(self) -> np.ndarray:
        """Positions of the document ends among all ids of the split, int64 ascending.

        Raises:
            UserError: a file is missing, truncated or changed.
        """
        ends = []
        for entry, start in zip(self.files, self.starts, strict=False):
            path = inside(self.directory, entry.flat.ends)
            self._check(path, 8 * entry.flat.documents, entry.flat.ends_sha256)
            ends.append(np.fromfile(path, "<i8") + start * self.record_length)
        return np.concatenate(ends) if ends else np.zeros(0, np.int64)

    @staticmethod
    def _check(path: Path, size: int, digest: str) -> None:
        if not path.is_file():
            raise UserError("a flat file of packed records is missing", where=path, hint=REPAIR)
        if path.stat().st_size != size:
            raise UserError(f"file is damaged: {size} bytes were written", where=path, value=path.stat().st_size,
                            hint=REPAIR)
        if size <= _CHECKED_BYTES and file_digest(path) != digest:
            raise UserError("file is damaged: its checksum differs from the index", where=path, hint=REPAIR)


def file_digest(path: Path) -> str:
    """SHA-256 of a file, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
