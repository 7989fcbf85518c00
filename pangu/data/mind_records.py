"""Packed records read from MindRecord files, by number."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from parallel.common.digests import check_file
from parallel.common.errors import UserError
from parallel.common.files import inside
from parallel.common.settings import Settings

COLUMN = "input_ids"
HEADER_BYTES = 1 << 20
_KEPT_BYTES = 1 << 26
REPAIR = "make the records anew with `python -m pangu pack`"


class RecordChecks(Settings):
    """Checksums of a MindRecord file, in the index."""

    records: str
    """Name of the file with the CRC-32 of every record, uint32 little-endian."""
    records_crc32: int
    """Of that file."""
    db_crc32: int
    """Of the `.db` file beside the records."""
    header_crc32: int
    """Of the file's header, its first MiB."""


class MindRecords:
    """The records of a split.

    Args:
        directory: folder of the records.
        files: entries of the index (`PackedFile`).
        record_length: ids of a record.

    Raises:
        UserError: files missing, truncated or damaged, or MindSpore is not installed.
    """

    def __init__(self, directory: str | Path, files: Sequence[Any], record_length: int) -> None:
        self.directory, self.record_length = Path(directory), record_length
        self._files = [str(self._checked(entry)) for entry in files]
        self._records = sum(entry.records for entry in files)
        try:
            import mindspore.dataset  # noqa: F401
        except ImportError:
            raise UserError("reading MindRecord files needs MindSpore", where=directory,
                            hint="write flat files with `python -m pangu flatten` where MindSpore is installed") \
                from None
        self._kept: np.ndarray | None = None
        found = self._guarded(self._size)
        self._sums = self._record_sums(files)
        if found != self._records:
            raise UserError(f"files are damaged: the index speaks of {self._records} records", where=self.directory,
                            value=found, hint=REPAIR)

    def __len__(self) -> int:
        return self._records

    def read(self, numbers: np.ndarray, rows: int) -> Iterator[np.ndarray]:
        """The records `numbers` in this order, int32 [rows, record_length] at a time (the last may be shorter).

        The files are opened once a call, so it wants many numbers; up to 64 MiB of records are kept instead, and their
        files opened once for good.
        """
        if not numbers.size:
            return
        if 4 * self._records * self.record_length <= _KEPT_BYTES:
            if self._kept is None:
                everything = np.arange(self._records)
                self._kept = np.concatenate(list(self._opened(everything, self._records)))
            yield from (self._kept[numbers[first:first + rows]] for first in range(0, numbers.size, rows))
            return
        yield from self._opened(numbers, rows)

    def _opened(self, numbers: np.ndarray, rows: int) -> Iterator[np.ndarray]:
        """`read` from the files; MindSpore takes no more numbers than there are records."""
        iterator = self._guarded(lambda: self._reader(numbers.tolist()).batch(rows).create_tuple_iterator(
            num_epochs=1, output_numpy=True))
        try:
            for first in range(0, numbers.size, rows):
                ids = self._guarded(lambda: next(iterator))[0]
                self._compare(ids, numbers[first:first + rows])
                yield ids
        except StopIteration:
            raise UserError("files are damaged: records are missing", where=self.directory, hint=REPAIR) from None
        finally:
            iterator.release()

    def _checked(self, entry: Any) -> Path:
        path = inside(self.directory, entry.file)
        if not path.is_file() or not path.with_name(path.name + ".db").is_file():
            raise UserError("a file of packed records is missing", where=path, hint=REPAIR)
        if path.stat().st_size != entry.bytes:
            raise UserError(f"file is damaged: {entry.bytes} bytes were written", where=path,
                            value=path.stat().st_size, hint=REPAIR)
        if entry.checks is not None:
            # Before MindSpore opens them: a changed byte in the index of a file (SQLite) or its header can crash it.
            check_file(f"{path}.db", entry.checks.db_crc32, hint=REPAIR)
            check_file(path, entry.checks.header_crc32, hint=REPAIR, nbytes=HEADER_BYTES)
        return path

    def _record_sums(self, files: Sequence[Any]) -> np.ndarray | None:
        """CRC-32 of every record, as they were written; None where a file was written without."""
        found = []
        for entry in files:
            if entry.checks is None:
                return None
            path = inside(self.directory, entry.checks.records)
            if not path.is_file():
                raise UserError("a file of packed records is missing", where=path, hint=REPAIR)
            check_file(path, entry.checks.records_crc32, hint=REPAIR)
            found.append(np.fromfile(path, "<u4"))
        return np.concatenate(found) if found else None

    def _compare(self, ids: np.ndarray, numbers: np.ndarray) -> None:
        if self._sums is None:
            return
        wrong = [number for row, number in zip(ids, numbers, strict=False)
                 if zlib.crc32(np.ascontiguousarray(row, "<i4")) != self._sums[number]]
        if wrong:
            raise UserError("files are damaged: a record has changed since it was written", where=self.directory,
                            value=int(wrong[0]), hint=REPAIR)

    def _reader(self, numbers: list[int]) -> Any:
        import mindspore.dataset as ds

        return ds.MindDataset(self._files, columns_list=[COLUMN], sampler=ds.SubsetSampler(numbers),
                              num_parallel_workers=1)

    def _size(self) -> int:
        import mindspore.dataset as ds

        return ds.MindDataset(self._files, columns_list=[COLUMN], shuffle=False).get_dataset_size()

    def _guarded(self, call: Any) -> Any:
        """`call()`, with what MindRecord throws at a damaged file as a user's error."""
        try:
            return call()
        except (RuntimeError, ValueError, TypeError) as error:
            cause = next((line for line in str(error).splitlines() if "[ERROR]" in line), str(error).split("\n")[0])
            raise UserError(f"cannot read the records: {cause.replace('[ERROR]', '').strip()[:160]}",
                            where=self.directory, hint=REPAIR) from None
