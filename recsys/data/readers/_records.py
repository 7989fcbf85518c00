"""Records of delimited text (RFC 4180): where each ends, whatever its cells hold, and whether its quotes are balanced.

A quoted cell may hold delimiters, line ends and doubled quotes. It begins right behind a delimiter or line end and ends
right before one; a quote elsewhere in a cell that does not begin with one is text. Anything else is an error that names
the row: read on, it would swallow the rows up to the next quote in silence. So would two stray quotes that happen to
fit: a cell over several lines, each of which would be a whole row by itself, is an error too.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

import numpy as np

from parallel.common.errors import UserError

_CHUNK_BYTES = 4 << 20
_MAX_RECORD_BYTES = 64 << 20
_QUOTE, _LINE_END, _RETURN = b'"'[0], b"\n"[0], b"\r"[0]
HINT = 'double a quote inside a quoted cell, or set data.quoted: false where quotes are text'


class Position:
    """Where reading is in a file: `row` data rows came before the bytes looked at (-1: the header is ahead too).

    Args:
        file: the file.
        delimiter: parts cells.
        headed: whether the first record names the columns.
        columns: how many there are; None: as many as the first line has.
    """

    def __init__(self, file: Path, delimiter: str, headed: bool, columns: int | None = None) -> None:
        self.file, self.delimiter, self.row = file, delimiter, -1 if headed else 0
        self.columns = columns

    def error(self, what: str, data: bytes, start: int, hint: str = HINT) -> UserError:
        """About the record that byte `start` of `data` is in."""
        before = io.StringIO(data[:start].decode("utf-8", "replace") + "x", newline="")
        csv.field_size_limit(1 << 30)
        records = sum(1 for cells in csv.reader(before, delimiter=self.delimiter) if cells)
        return UserError(what, where=f"{self.file}, row {self.row + records}",
                         value=data[start:start + 40].decode("utf-8", "replace"), hint=hint)

    def look(self, data: bytes) -> None:
        """Takes the number of columns from the file's first bytes where nobody has said it."""
        if self.columns is None:
            self.columns = len(_cells(re.split(rb"[\r\n]", data, maxsplit=1)[0], self.delimiter.encode()))


def complete_records(stream: BinaryIO, position: Position, quoted: bool) -> Iterator[bytes]:
    """The bytes of complete records, a few MB at a time. The caller counts rows on in `position.row` as it reads them.

    Raises:
        UserError: quotes that do not balance, or a record of more than 64 MB; names the row.
    """
    rest = b""
    while True:
        chunk = stream.read(_CHUNK_BYTES)
        data = rest + chunk
        if not data:
            return
        position.look(data)
        end = _last_end(data, position.delimiter.encode(), quoted, not chunk, position)
        if end:
            yield data[:end]
        rest = data[end:]
        if len(rest) > _MAX_RECORD_BYTES:
            raise position.error("a record of more than 64 MB", rest, 0)
        if not chunk:
            return


def _last_end(data: bytes, delimiter: bytes, quoted: bool, last: bool, position: Position) -> int:
    """Where the last complete record of `data` ends."""
    if not quoted or _QUOTE not in data:
        return len(data) if last else data.rfind(b"\n") + 1
    array = np.frombuffer(data, np.uint8)
    marks = np.flatnonzero(array == _QUOTE)
    opening, closing = marks[::2], marks[1::2]
    before = np.where(opening > 0, array[np.maximum(opening, 1) - 1], _LINE_END)
    after = np.where(closing + 1 < len(array), array[np.minimum(closing + 1, len(array) - 1)], _LINE_END)
    fits = (np.isin(before, (delimiter[0], _LINE_END, _QUOTE)).all()
            and np.isin(after, (delimiter[0], _LINE_END, _RETURN, _QUOTE)).all())
    if fits:
        _refuse_swallowed(data, opening, closing, delimiter, position)
        stop = int(opening[-1]) if len(opening) > len(closing) else len(data)
        if last and stop < len(data):
            raise position.error("a quoted cell has no end", data, stop)
        return len(data) if last else _end_outside(data, stop, marks)
    return _scan(data, delimiter, last, position)


def _end_outside(data: bytes, stop: int, marks: np.ndarray) -> int:
    """Behind the last line end before `stop` that is outside quotes."""
    end = data.rfind(b"\n", 0, stop)
    while end >= 0 and np.searchsorted(marks, end) % 2:
        end = data.rfind(b"\n", 0, int(marks[np.searchsorted(marks, end) - 1]))
    return end + 1


def _refuse_swallowed(data: bytes, opening: np.ndarray, closing: np.ndarray, delimiter: bytes,
                      position: Position) -> None:
    ends = np.flatnonzero(np.frombuffer(data, np.uint8) == _LINE_END)
    count = min(len(opening), len(closing))
    lines = np.searchsorted(ends, closing[:count]) - np.searchsorted(ends, opening[:count])
    for index in np.flatnonzero(lines):
        _refuse_rows(data, int(opening[index]), int(closing[index]), delimiter, position)


def _refuse_rows(data: bytes, start: int, stop: int, delimiter: bytes, position: Position) -> None:
    """A quoted cell (its quotes at `start` and `stop`) over several lines that would all be rows without the quotes.

    Such a line has the delimiters of a row, and numbers where the row that the cell is in has numbers: lines of a
    description that happen to have as many delimiters hardly ever have those too.
    """
    wide = (position.columns or 1) - 1
    lines = data.count(b"\n", start, stop)
    if not lines or not wide or data.count(delimiter, start, stop) != lines * wide:
        return
    inner = data[start + 1:stop].split(b"\n")
    behind, ahead = inner[0].count(delimiter), inner[-1].count(delimiter)
    if behind + ahead != wide or any(line.count(delimiter) != wide for line in inner[1:-1]):
        return
    begin, end = data.rfind(b"\n", 0, start) + 1, data.find(b"\n", stop)
    left = _cells(data[begin:start], delimiter)[:-1]
    right = _cells(data[stop + 1:end if end >= 0 else len(data)], delimiter)[1:]
    rows = [line.decode("utf-8", "replace").split(delimiter.decode()) for line in inner]
    if len(left) == ahead and len(right) == behind and all(
            _alike(left, later[:ahead]) and _alike(right, row[len(row) - behind:]) for row, later in pairwise(rows)):
        raise position.error(f"a quoted cell goes over {lines + 1} lines that are whole rows without its quotes: they "
                             "are not where they should be", data, start)


def _cells(line: bytes, delimiter: bytes) -> list[str]:
    try:
        return next(csv.reader([line.decode("utf-8", "replace")], delimiter=delimiter.decode()), [])
    except csv.Error:
        return []


def _alike(cells: list[str], others: list[str]) -> bool:
    """Whether there are numbers where there are numbers; an empty cell may be anything."""
    return all(not one or not other or _is_number(one) == _is_number(other)
               for one, other in zip(cells, others, strict=True))


def _is_number(cell: str) -> bool:
    try:
        float(cell.strip('" \r'))
    except ValueError:
        return False
    return True


def record_ends(data: bytes, quoted: bool, last: bool, position: Position) -> list[int]:
    """Where each complete record of `data`, which begins with one, ends; with `last` the last one may lack its line
    end.

    Raises:
        UserError: quotes that do not balance; as `position` says it.
    """
    if not quoted or _QUOTE not in data:
        ends = [match.end() for match in re.finditer(b"\n", data)]
    else:
        ends = list(_scanned(data, position.delimiter.encode(), last, position))
    return [*ends, len(data)] if last and len(data) > (ends[-1] if ends else 0) else ends


def cells_of(record: bytes, delimiter: str, quoted: bool) -> list[str]:
    """The cells of one record, its line end left out; [] for a blank line.

    Raises:
        UnicodeDecodeError: not UTF-8.
    """
    text = record.decode().removesuffix("\n").removesuffix("\r")
    if quoted and '"' in text:
        csv.field_size_limit(1 << 30)
        return next(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter), [])
    return text.split(delimiter) if text else []


def _scan(data: bytes, delimiter: bytes, last: bool, position: Position) -> int:
    end = 0
    for end in _scanned(data, delimiter, last, position):  # noqa: B007
        pass
    return len(data) if last else end


def _scanned(data: bytes, delimiter: bytes, last: bool, position: Position) -> Iterator[int]:
    """Ends of records, cell by cell, for data with quotes that are text."""
    mark = re.escape(delimiter)
    plain = re.compile(rb'[^"' + mark + rb'\n][^' + mark + rb'\n]*|')
    inside = re.compile(rb'"[^"]*(?:""[^"]*)*"')
    at = 0
    while at < len(data):
        if data[at] == _QUOTE:
            match = inside.match(data, at)
            if match is None:
                if last:
                    raise position.error("a quoted cell has no end", data, at)
                return
            _refuse_rows(data, at, match.end() - 1, delimiter, position)
            at = match.end()
            if at < len(data) and data[at:at + 1] not in (delimiter, b"\n", b"\r"):
                raise position.error("text behind the end of a quoted cell", data, match.start())
            at += data[at:at + 2] == b"\r\n"
        else:
            at = plain.match(data, at).end()
        if at < len(data) and data[at] == _LINE_END:
            yield at + 1
        at += 1
