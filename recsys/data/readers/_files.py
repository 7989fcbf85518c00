"""Streaming of CSV and parquet files into tables; what the readers of real data sets share."""

from __future__ import annotations

import glob
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as csv
import pyarrow.parquet as parquet

from parallel.common.errors import UserError
from parallel.common.files import COMPRESSED_SUFFIXES, open_binary
from parallel.common.progress import info
from recsys.data.features import Feature

ROWS_AT_ONCE = 65536
_BLOCK_BYTES = 8 << 20


def shards(path: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """The files that `path` stands for: one file, a folder's files with `suffixes` (sorted), or a glob pattern.

    Raises:
        UserError: nothing is there.
    """
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.is_file() and _bare_suffix(file) in suffixes)
    elif any(mark in str(path) for mark in "*?["):
        found = sorted(Path(name) for name in glob.glob(str(path)))
    else:
        found = [path] if path.is_file() else []
    if not found:
        raise UserError(f"no {' or '.join(suffixes)} file here", where="data.path", value=str(path),
                        hint="check the path")
    return found


def _bare_suffix(file: Path) -> str:
    suffixes = [suffix for suffix in file.suffixes if suffix not in COMPRESSED_SUFFIXES]
    return suffixes[-1] if suffixes else ""


def csv_tables(file: Path, *, delimiter: str = ",", names: list[str] | None = None,
               quoted: bool = True) -> Iterator[tuple[pa.Table, str]]:
    """Tables of a text file with a header line (or `names`), every cell as text, in pieces of a few MB.

    Raises:
        UserError: not UTF-8, rows of different lengths, a damaged archive.
    """
    try:
        with open_binary(file) as stream:
            head = stream.read(1)
        if not head:
            info(f"{file}: empty, left out")
            return
        columns = names or _header(file, delimiter)
        reader = csv.open_csv(
            pa.PythonFile(open_binary(file), "r"),
            read_options=csv.ReadOptions(block_size=_BLOCK_BYTES, column_names=names, use_threads=False),
            parse_options=csv.ParseOptions(delimiter=delimiter, quote_char='"' if quoted else False),
            convert_options=csv.ConvertOptions(column_types=dict.fromkeys(columns, pa.string()),
                                               strings_can_be_null=True, null_values=["", "NULL", "\\N"]))
        for batch in reader:
            yield pa.Table.from_batches([batch]), str(file)
    except pa.ArrowInvalid as error:
        raise UserError(f"not a well-formed table: {error}", where=file, hint="check delimiter and quotes") from None
    except (EOFError, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise UserError(f"cannot be read to its end: {error}", where=file, hint="fetch it again") from None


def _header(file: Path, delimiter: str) -> list[str]:
    with open_binary(file) as stream:
        line = stream.readline(1 << 20)
    try:
        return [name.strip().strip('"') for name in line.decode("utf-8-sig").rstrip("\r\n").split(delimiter)]
    except UnicodeDecodeError:
        raise UserError("not UTF-8 text", where=file) from None


def parquet_tables(file: Path) -> Iterator[tuple[pa.Table, str]]:
    """Tables of a parquet file, ROWS_AT_ONCE rows each.

    Raises:
        UserError: damaged, or not parquet.
    """
    if file.stat().st_size == 0:
        info(f"{file}: empty, left out")
        return
    try:
        source = parquet.ParquetFile(file)
        for batch in source.iter_batches(ROWS_AT_ONCE):
            yield pa.Table.from_batches([batch]), str(file)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"not a whole parquet file: {error}", where=file, hint="fetch it again") from None


def ids(names: list[str], side: str, group: str, **more: object) -> list[Feature]:
    """Id features of one group."""
    return [Feature(name=name, side=side, group=group, **more) for name in names]


def no_default_features(data: object) -> list[Feature]:
    """For readers whose columns are anything: the config file must list the features.

    Raises:
        UserError: always.
    """
    raise UserError("this reader does not know the columns", where="data.features", hint="list the features")
