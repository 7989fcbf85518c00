"""Streaming of CSV and parquet files into tables; what the readers of real data sets share."""

from __future__ import annotations

import csv as python_csv
import os
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as csv
import pyarrow.parquet as parquet

from parallel.common.errors import UserError
from parallel.common.files import COMPRESSED_SUFFIXES, matching, open_utf8
from parallel.common.progress import info
from recsys.data.features import Feature
from recsys.data.readers._records import Position, complete_records

ROWS_AT_ONCE = 65536


def shards(path: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """The files that `path` stands for: one file, a folder's files with `suffixes` (sorted), or a glob pattern.

    Raises:
        UserError: nothing is there.
    """
    found = [file for position in matching(path) for file in (
        sorted(file for file in position.rglob("*") if file.is_file() and _bare_suffix(file) in suffixes
               and not file.name.startswith("."))
        if position.is_dir() else [position])]
    if not found:
        raise UserError(f"no {' or '.join(suffixes)} file here", where="data.path", value=str(path),
                        hint="check the path")
    return found


def _bare_suffix(file: Path) -> str:
    suffixes = [suffix for suffix in map(str.lower, file.suffixes) if suffix not in COMPRESSED_SUFFIXES]
    return suffixes[-1] if suffixes else ""


def csv_tables(file: Path, *, delimiter: str = ",", names: list[str] | None = None,
               quoted: bool = True) -> Iterator[tuple[pa.Table, str]]:
    """Tables of a text file with a header line (or `names`), every cell as text, in chunks of a few MB.

    Raises:
        UserError: not UTF-8, rows of different lengths, quotes that do not balance, a damaged archive; names the row.
    """
    with open_utf8(file) as stream:
        if not stream.peek(1):
            info(f"{file}: empty, left out")
            return
        columns, position = names, Position(file, delimiter, names is None, len(names) if names else None)
        for data in complete_records(stream, position, quoted):
            table = _table(data, columns, position, quoted)
            columns = columns or table.column_names
            position.row = max(position.row, 0) + len(table)
            if len(table):
                yield table, str(file)


def _table(data: bytes, columns: list[str] | None, position: Position, quoted: bool) -> pa.Table:
    """Complete records as a table of text; without `columns` the first is the header."""
    wrong: list[csv.InvalidRow] = []

    def refuse(row: csv.InvalidRow) -> str:
        wrong.append(row)
        return "error"

    delimiter = position.delimiter
    try:
        data.decode()
    except UnicodeDecodeError as error:
        raise position.error("not UTF-8 text", data, error.start, hint="convert the file to UTF-8") from None
    names = columns or _header(data, delimiter, quoted)
    kept = csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=True,
                              null_values=["", "NULL", "\\N"])
    try:
        return csv.read_csv(
            pa.BufferReader(data), convert_options=kept,
            read_options=csv.ReadOptions(block_size=len(data) + 1, column_names=columns, use_threads=False),
            parse_options=csv.ParseOptions(delimiter=delimiter, quote_char='"' if quoted else False,
                                           newlines_in_values=quoted, invalid_row_handler=refuse))
    except pa.ArrowInvalid as error:
        if wrong:
            # Arrow counts from 1, the header too.
            raise UserError(f"{wrong[0].actual_columns} cells where the table has {wrong[0].expected_columns} columns",
                            where=f"{position.file}, row {position.row + (wrong[0].number or 1)}", value=wrong[0].text,
                            hint="not a well-formed table: check delimiter and quotes") from None
        raise UserError(f"not a well-formed table: {error}",
                        where=f"{position.file}, behind row {max(position.row, 0)}",
                        hint="check delimiter and quotes") from None


def _header(data: bytes, delimiter: str, quoted: bool) -> list[str]:
    line = data[:data.find(b"\n")] if b"\n" in data else data
    text = line.decode().rstrip("\r")
    if quoted and '"' in text:
        return next(python_csv.reader([text], delimiter=delimiter))
    return text.split(delimiter)


def parquet_tables(file: Path) -> Iterator[tuple[pa.Table, str]]:
    """Tables of a parquet file, ROWS_AT_ONCE rows each.

    Raises:
        UserError: damaged, or not parquet.
    """
    if file.stat().st_size == 0:
        info(f"{file}: empty, left out")
        return
    try:
        source = parquet.ParquetFile(pa.OSFile(os.fsencode(file)))  # a name need not be UTF-8
        for batch in source.iter_batches(ROWS_AT_ONCE):
            yield pa.Table.from_batches([batch]), str(file)
    except (pa.ArrowException, OSError, ValueError, MemoryError, OverflowError) as error:
        raise UserError(f"not a complete parquet file: {error}", where=file, hint="fetch it again") from None


def ids(names: list[str], side: str, group: str, **more: object) -> list[Feature]:
    """Id features of one group."""
    return [Feature(name=name, side=side, group=group, **more) for name in names]


def no_default_features(data: object) -> list[Feature]:
    """For readers whose columns are anything: the config file must list the features.

    Raises:
        UserError: always.
    """
    raise UserError("this reader does not know the columns", where="data.features", hint="list the features")
