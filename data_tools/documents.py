"""Documents, the parts they are read from, and the files they are written to.

A document is a JSON object with `id`, `text`, `source`; other keys pass through untouched. An input is split into
`Split`s: a file, or a byte range of it (plain jsonl), or row groups (parquet). What a reader cannot use is not an
exception but a line in the `ReadLog`: a document that is dropped, a document that was repaired, or a damaged file.
"""

from __future__ import annotations

import contextlib
import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from data_tools import readers
from data_tools.records import Document, ReadLog, ReadSettings, Split
from parallel.common.errors import UserError
from parallel.common.files import atomic_write, matching, name_text
from parallel.common.json_text import dump_json, plain

REMOVED_FOLDER = "removed"  # is beside documents that these tools wrote, and is never read as input
_PARQUET_BATCH = 1000
OutputFormat = Literal["jsonl", "jsonl.gz", "jsonl.zst", "parquet"]


def plan_splits(inputs: list[str], settings: ReadSettings) -> list[Split]:
    """Splits files, folders (searched to the bottom) and glob patterns into parts, in the order of their names.

    Raises:
        UserError: nothing is found, or a file has a suffix that no reader knows.
    """
    splits: list[Split] = []
    for path, name in find_files(inputs):
        reader = readers.reader_for(path)
        for start, end in readers.load(reader).ranges(path, settings):
            splits.append(Split(len(splits), str(path.absolute()), name, reader, start, end))
    return splits


def find_files(inputs: list[str]) -> list[tuple[Path, str]]:
    """(path, name) of every input file; the name is the path below the input folder, and is part of generated ids."""
    found: dict[Path, str] = {}
    for text in inputs:
        root = Path(text)
        if root.is_file():
            readers.reader_for(root)
            found[root] = name_text(root.name)
            continue
        if root.is_dir():
            paths, base = sorted(root.rglob("*")), root
        else:
            paths, base = matching(root), None
        for path in paths:
            inner = path.relative_to(base) if base is not None else path
            hidden = any(part == REMOVED_FOLDER or part.startswith((".", "_")) for part in inner.parts)
            if path.is_file() and not (base is not None and hidden) and readers.known(path):
                found[path] = name_text(inner.as_posix() if base is not None else path.name)
    if not found:
        raise UserError("no documents found", where="--input", value=inputs,
                        hint=f"give a file, folder or pattern of {', '.join(readers.suffixes())}")
    return sorted(found.items(), key=lambda entry: (entry[1], str(entry[0])))


def read_split(split: Split, settings: ReadSettings, log: ReadLog) -> Iterator[Document]:
    """The documents of one part; what cannot be read goes to `log`."""
    yield from readers.load(split.reader).read(split, settings, log)


class RecordWriter:
    """Writes records to `path` (format by its suffix), which takes its name only when the block ends without error."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stack = contextlib.ExitStack()
        self._rows: list[dict[str, Any]] = []

    def __enter__(self) -> RecordWriter:
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(atomic_write(self.path, "wb"))
            if self.path.suffix == ".parquet":
                self._file = stack.enter_context(_parquet_writer(file))
            else:
                self._file = stack.enter_context(_compressed(file, self.path.suffix))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        if error[0] is None and self.path.suffix == ".parquet":
            with contextlib.ExitStack() as stack:
                stack.push(self._stack.__exit__)  # also when the last rows cannot be written
                self._write_rows()
            return
        self._stack.__exit__(*error)

    def write(self, record: dict[str, Any]) -> None:
        if self.path.suffix != ".parquet":
            self._file.write(dump_json(record).encode() + b"\n")
            return
        record = dict(record)
        row = {key: record.pop(key, None) for key in ("id", "text", "source")}
        self._rows.append({**plain(row), "other": dump_json(record) if record else None})
        if len(self._rows) == _PARQUET_BATCH:
            self._write_rows()

    def _write_rows(self) -> None:
        import pyarrow

        self._file.write_table(pyarrow.Table.from_pylist(self._rows, schema=_parquet_schema()))
        self._rows = []


def _compressed(file: Any, suffix: str) -> Any:
    if suffix == ".gz":
        # No time stamp, so that the same documents give the same bytes.
        return gzip.GzipFile(fileobj=file, mode="wb", mtime=0, compresslevel=6)
    if suffix == ".zst":
        import zstandard

        return zstandard.ZstdCompressor(level=3).stream_writer(file, closefd=False)
    return contextlib.nullcontext(file)


def _parquet_schema() -> Any:
    """Parquet has the columns id, text, source and `other` (the further keys as one JSON text)."""
    import pyarrow

    return pyarrow.schema([(name, pyarrow.string()) for name in ("id", "text", "source", "other")])


def _parquet_writer(file: Any) -> Any:
    from pyarrow import parquet

    return parquet.ParquetWriter(file, _parquet_schema(), compression="zstd")
