"""Packed records read from MindRecord files, by number."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from parallel.common.errors import UserError
from parallel.common.files import inside

COLUMN = "input_ids"
REPAIR = "make the records anew with `python -m pangu pack`"


class MindRecords:
    """The records of a split.

    Args:
        directory: folder of the records.
        files: entries of the index (`PackedFile`).
        record_length: ids of a record.

    Raises:
        UserError: files missing, cut off or damaged, or MindSpore is not installed.
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
        found = self._guarded(lambda: self._reader([0]) and self._size())
        if found != self._records:
            raise UserError(f"files are damaged: the index speaks of {self._records} records", where=self.directory,
                            value=found, hint=REPAIR)

    def __len__(self) -> int:
        return self._records

    def read(self, numbers: np.ndarray, rows: int) -> Iterator[np.ndarray]:
        """The records `numbers` in this order, int32 [rows, record_length] at a time (the last may be shorter)."""
        if not numbers.size:
            return
        if numbers.size > self._records:  # the reader takes no more numbers than there are records
            different, places = np.unique(numbers, return_inverse=True)
            ids = next(self.read(different, different.size))[places]
            yield from (ids[first:first + rows] for first in range(0, len(ids), rows))
            return
        iterator = self._guarded(lambda: self._reader(numbers.tolist()).batch(rows).create_tuple_iterator(
            num_epochs=1, output_numpy=True))
        try:
            for _ in range(-(-numbers.size // rows)):
                yield self._guarded(lambda: next(iterator))[0]
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
        return path

    def _reader(self, numbers: list[int]) -> Any:
        import mindspore.dataset as ds

        return ds.MindDataset(self._files, columns_list=[COLUMN], sampler=ds.SubsetSampler(numbers),
                              num_parallel_workers=1)

    def _size(self) -> int:
        import mindspore.dataset as ds

        return ds.MindDataset(self._files, columns_list=[COLUMN], shuffle=False).get_dataset_size()

    def _guarded(self, call: Any) -> Any:
        """`call()`, with what MindRecord throws at a damaged file told as a user's error."""
        try:
            return call()
        except (RuntimeError, ValueError, TypeError) as error:
            cause = next((line for line in str(error).splitlines() if "[ERROR]" in line), str(error).split("\n")[0])
            raise UserError(f"cannot read the records: {cause.replace('[ERROR]', '').strip()[:160]}",
                            where=self.directory, hint=REPAIR) from None
