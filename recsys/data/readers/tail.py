"""A growing folder of parquet or csv files, read in order of their names as a stream.

Writers put a finished file in place (a temporary name beginning with `.` or `_`, then a rename) under a name after all
others, for example by time; a csv file may also grow by whole lines while it is the newest. Each row is an event.
"""

from __future__ import annotations

import codecs
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as parquet

from parallel.common.errors import UserError
from parallel.common.progress import info
from recsys.data.readers import Reader
from recsys.data.readers._files import csv_tables, no_default_features, parquet_tables
from recsys.data.readers._records import HINT, Position, cells_of, record_ends
from recsys.data.streams.events import Event, Positions, TimeOf

if TYPE_CHECKING:
    from recsys.settings import DataSettings

_SUFFIXES = (".parquet", ".pq", ".csv", ".tsv")
_LOOK_SECONDS = 0.05
_BLOCK = 1 << 20


class Folder:
    """A `Transport` of one partition. A position is [file, offset]: rows of a parquet file that were read, or bytes of
    a csv file.

    Args:
        data: `DataSettings`; `path` is the folder.
    """

    shared = False

    def __init__(self, data: DataSettings) -> None:
        if not data.path or not Path(data.path).is_dir():
            raise UserError("reader tail needs a folder", where="data.path", value=data.path)
        self.folder, self.delimiter, self.settings = Path(data.path), data.delimiter, data.stream
        self.quoted = data.quoted
        self.time, self.name = TimeOf(data.time, data.stream.time_unit), "folder"
        self.at: list = ["", 0]
        self.header: tuple[str, list[str]] | None = None
        self.passed: set[str] = set()

    def begin(self) -> Positions:
        """In front of the oldest file."""
        files = self._files()
        return {self.name: [files[0].name if files else "", 0]}

    def open(self, positions: Positions) -> None:
        """Goes to this position."""
        self.at = list(positions[self.name])
        self.passed = {file.name for file in self._files() if file.name < self.at[0]}

    def poll(self, wanted: set[str], most: int, seconds: float) -> list[Event]:
        """See `Transport`."""
        deadline = time.monotonic() + seconds
        while wanted:
            events = self._read(most)
            if events or time.monotonic() > deadline:
                return events
            time.sleep(_LOOK_SECONDS)
        return []

    def commit(self, positions: Positions) -> bool:
        """Nothing to commit."""
        return True

    def close(self) -> None:
        """Nothing is open."""

    def _files(self) -> list[Path]:
        return sorted((file for file in self.folder.iterdir() if file.suffix in _SUFFIXES and file.is_file()
                       and file.name[0] not in "._"), key=lambda file: file.name)

    def _read(self, most: int) -> list[Event]:
        """The next events; a file is left for the next one when it is read to its end and a later one is there."""
        while True:
            file, later = self._current()
            if file is None:
                return []
            events = self._csv(file, most, final=later is not None) if file.suffix in (".csv", ".tsv") else \
                self._parquet(file, most)
            if events or later is None:
                return events
            self.passed.add(file.name)
            self.at = [later.name, 0]

    def _current(self) -> tuple[Path | None, Path | None]:
        """(the file at the position, the one after it).

        Raises:
            UserError: the file is gone, or a file came whose turn is over.
        """
        files = self._files()
        names = [file.name for file in files]
        if not self.at[0]:
            if not files:
                return None, None
            self.at = [names[0], 0]
        self._look_back(names)
        if self.at[0] in names:
            index = names.index(self.at[0])
            return files[index], files[index + 1] if index + 1 < len(files) else None
        if self.settings.gap == "error":
            raise UserError("the file is gone before it was known to be read to its end", where=self.folder,
                            value=self.at[0], hint="put it back, or accept the gap with data.stream.gap=skip")
        later = [file for file in files if file.name > self.at[0]]
        if not later:
            return None, None
        info(f"{self.folder / self.at[0]} is gone; going on with {later[0].name}")
        self.at = [later[0].name, 0]
        return self._current()

    def _look_back(self, names: list[str]) -> None:
        late = [name for name in names if name < self.at[0] and name not in self.passed]
        if late and self.settings.gap == "error":
            raise UserError("a file came under a name before one that was read already", where=self.folder,
                            value=late[0], hint=f"name it after {self.at[0]}, or leave it out with "
                            "data.stream.gap=skip")
        for name in late:
            info(f"{self.folder / name} came too late and is left out")
            self.passed.add(name)

    def _event(self, file: Path, position: int, row: dict) -> Event:
        self.at = [file.name, position]
        return self.time.event(self.name, list(self.at), row, None)

    def _parquet(self, file: Path, most: int) -> list[Event]:
        skip, events, row_number = self.at[1], [], 0
        try:
            source = parquet.ParquetFile(pa.OSFile(os.fsencode(file)))
            for group in range(source.num_row_groups):
                rows = source.metadata.row_group(group).num_rows
                if row_number + rows > skip:
                    table = source.read_row_group(group).slice(max(0, skip - row_number), most - len(events))
                    events += [self._event(file, self.at[1] + 1, row) for row in table.to_pylist()]
                row_number += rows
                if len(events) >= most:
                    break
        except (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:
            raise UserError(f"not a complete parquet file: {error}", where=file,
                            hint="write it under a name that begins with . and rename it") from None
        return events

    def _csv(self, file: Path, most: int, final: bool) -> list[Event]:
        """Complete lines from the position on; the last line of a finished file may lack its end."""
        columns, start = self._columns(file)
        if columns is None:
            return []
        begin = max(self.at[1], start)
        if file.stat().st_size < begin:
            raise UserError("the file became shorter", where=file, hint="append to it only")
        with file.open("rb") as stream:
            stream.seek(begin)
            block = stream.read(_BLOCK)
            ended = final and not stream.read(1)
        position = _Byte(file, self._delimiter(file), begin, len(columns))
        ends = record_ends(block, self.quoted, ended, position)
        if not ends and len(block) == _BLOCK:
            raise UserError(f"a row is longer than {_BLOCK} bytes", where=file, value=begin)
        events, last = [], 0
        for end in ends[:most]:
            cells = self._cells(block[last:end], file, begin + last)
            if cells and len(cells) != len(columns):
                raise UserError(f"{len(cells)} cells where the table has {len(columns)} columns",
                                where=f"{file}, byte {begin + last}", value=block[last:last + 40].decode(),
                                hint="check delimiter and quotes")
            if cells:
                events.append(self._event(file, begin + end, dict(zip(columns, cells, strict=True))))
            last = end
        return events

    def _cells(self, record: bytes, file: Path, position: int) -> list[str]:
        try:
            return cells_of(record, self._delimiter(file), self.quoted)
        except UnicodeDecodeError:
            raise UserError("not UTF-8 text", where=f"{file}, byte {position}") from None

    def _columns(self, file: Path) -> tuple[list[str] | None, int]:
        """(names in the first line, where the rows begin); None while the line is not complete."""
        with file.open("rb") as stream:
            line = stream.readline(_BLOCK)
        if not line.endswith(b"\n"):
            return None, 0
        if self.header is None or self.header[0] != file.name:
            self.header = file.name, self._cells(line.removeprefix(codecs.BOM_UTF8), file, 0)
        return self.header[1], len(line)

    def _delimiter(self, file: Path) -> str:
        return "\t" if file.suffix == ".tsv" else self.delimiter


class _Byte(Position):
    """Names the byte of the file, since rows are not counted."""

    def __init__(self, file: Path, delimiter: str, begin: int, columns: int) -> None:
        super().__init__(file, delimiter, False, columns)
        self.begin = begin

    def error(self, what: str, data: bytes, start: int, hint: str = HINT) -> UserError:
        return UserError(what, where=f"{self.file}, byte {self.begin + start}",
                         value=data[start:start + 40].decode("utf-8", "replace"), hint=hint)


def read(data: DataSettings, path: Path) -> Iterator[tuple[Any, str]]:
    """Tables of the files that are there now, for other verbs than train."""
    for file in sorted(path.iterdir(), key=lambda file: file.name):
        if file.suffix in (".parquet", ".pq") and file.name[0] not in "._":
            yield from parquet_tables(file)
        elif file.suffix in (".csv", ".tsv") and file.name[0] not in "._":
            yield from csv_tables(file, delimiter="\t" if file.suffix == ".tsv" else data.delimiter,
                                  quoted=data.quoted)


READER = Reader(read, no_default_features, stream=Folder)
