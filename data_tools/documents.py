"""Documents, the parts they are read from, and the files they are written to.

A document is a JSON object with `id`, `text`, `source`; other keys pass through untouched. An input is cut into
`Split`s: a file, or a byte range of it (plain jsonl), or row groups (parquet). What a reader cannot use is not an
exception but a line in the `ReadLog`: a document that is dropped, a document that was repaired, or a damaged file.
"""

from __future__ import annotations

import contextlib
import gzip
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from data_tools import readers
from data_tools.readers._lines import decode
from parallel.common.errors import UserError
from parallel.common.files import atomic_write, matching
from parallel.common.json_text import dump_json, has_surrogates, plain, without_surrogates
from parallel.common.settings import Settings

REMOVED_FOLDER = "removed"  # stands beside documents that we wrote, and is never read as input
_PARQUET_BATCH = 1000
OutputFormat = Literal["jsonl", "jsonl.gz", "jsonl.zst", "parquet"]


class ReadSettings(Settings):
    """How inputs are read."""

    text_key: str = "text"
    """Key (jsonl) or column (parquet) that holds the text."""
    id_key: str = "id"
    """Key or column that holds the id; a document without one gets `file:offset`."""
    source_key: str = "source"
    """Key or column that holds the source; a document without one gets `source`."""
    source: str | None = None
    """Source of documents that name none; null = the name of the file without its suffixes."""
    text_unit: Literal["file", "line", "blank_line"] = "file"
    """What one document is in a plain text file: the file, a line, or the lines up to a blank one."""
    maximum_document_bytes: int = 32 << 20
    """Larger documents are dropped and counted (rule read_too_long)."""
    maximum_broken_share: float = 0.01
    """Documents of which more than this share of the characters cannot be decoded are dropped (read_broken_text)."""
    split_bytes: int = 32 << 20
    """Plain jsonl and parquet files are cut into parts of about this size, so that several workers can share one."""


@dataclass(frozen=True)
class Split:
    """Part `index` of the input: `reader` reads `path` from `start` to `end` (None = the end)."""

    index: int
    path: str
    name: str
    reader: str
    start: int = 0
    end: int | None = None


@dataclass
class Document:
    """One text. `other` holds further keys of the record (title, url, ...), which are written back."""

    id: str
    text: str
    source: str
    other: dict[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        title = self.other.get("title")
        return title if isinstance(title, str) else ""

    def record(self) -> dict[str, Any]:
        return {"id": self.id, "text": self.text, "source": self.source, **self.other}


@dataclass
class ReadLog:
    """What went wrong while reading: dropped documents, repaired documents by kind, damaged files."""

    dropped: list[dict[str, Any]] = field(default_factory=list)
    repaired: Counter = field(default_factory=Counter)
    damaged_files: list[dict[str, str]] = field(default_factory=list)

    def drop(self, kind: str, document_id: str, source: str, evidence: str) -> None:
        self.dropped.append({"id": document_id, "source": source, "step": "read", "rule": f"read_{kind}",
                             "evidence": evidence[:200]})

    def repair(self, kind: str) -> None:
        self.repaired[kind] += 1

    def damaged(self, kind: str, path: str, evidence: str) -> None:
        self.damaged_files.append({"path": path, "kind": kind, "evidence": evidence[:200]})


def plan_splits(inputs: list[str], settings: ReadSettings) -> list[Split]:
    """Cuts files, folders (searched to the bottom) and glob patterns into parts, in the order of their names.

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
    """(path, name) of every input file; the name is the path below the input folder, and stands in generated ids."""
    found: dict[Path, str] = {}
    for text in inputs:
        root = Path(text)
        if root.is_file():
            readers.reader_for(root)
            found[root] = root.name
            continue
        if root.is_dir():
            paths, base = sorted(root.rglob("*")), root
        else:
            paths, base = matching(root), None
        for path in paths:
            inner = path.relative_to(base) if base is not None else path
            hidden = any(part == REMOVED_FOLDER or part.startswith((".", "_")) for part in inner.parts)
            if path.is_file() and not (base is not None and hidden) and readers.known(path):
                found[path] = inner.as_posix() if base is not None else path.name
    if not found:
        raise UserError("no documents found", where="--input", value=inputs,
                        hint=f"give a file, folder or pattern of {', '.join(readers.suffixes())}")
    return sorted(found.items(), key=lambda entry: (entry[1], str(entry[0])))


def read_split(split: Split, settings: ReadSettings, log: ReadLog) -> Iterator[Document]:
    """The documents of one part; what cannot be read goes to `log`."""
    yield from readers.load(split.reader).read(split, settings, log)


def build_document(record: dict[str, Any], fallback_id: str, split: Split, settings: ReadSettings,
                   log: ReadLog) -> Document | None:
    """A document out of a record with a text, repaired where the characters ask for it; None if it was dropped."""
    other = dict(record)
    text = other.pop(settings.text_key, None)
    identity = other.pop(settings.id_key, None)
    source = other.pop(settings.source_key, None)
    document_id = clean_characters(str(plain(identity)), None) if identity not in (None, "") else fallback_id
    source = clean_characters(str(plain(source)), None) if source not in (None, "") else default_source(split, settings)
    if isinstance(text, bytes):
        text = decode(text, log)
    if not isinstance(text, str):
        log.drop("no_text", document_id, source, f"key '{settings.text_key}' holds {type(text).__name__}")
        return None
    text = clean_characters(text, log)
    other = _clean_other(other, log)
    limit = settings.maximum_document_bytes
    if len(text) > limit // 4 and len(text.encode()) > limit:  # a character takes at most four bytes
        log.drop("too_long", document_id, source, f"{len(text)} characters")
        return None
    if text.count("\ufffd") > settings.maximum_broken_share * len(text):
        log.drop("broken_text", document_id, source, f"{text.count(chr(0xFFFD))} of {len(text)} characters undecodable")
        return None
    return Document(document_id, text, source, other)


def _clean_other(other: dict[str, Any], log: ReadLog) -> dict[str, Any]:
    """The further keys as values that JSON has, so that they can be written whatever the source was typed as."""
    if not other:
        return other
    if has_surrogates(other):
        log.repair("lone_surrogates")
    return plain(other)


def default_source(split: Split, settings: ReadSettings) -> str:
    """Source of documents that name none: the setting, else the name of the file without its suffixes."""
    return settings.source or Path(split.name).name.split(".")[0]


def clean_characters(text: str, log: ReadLog | None) -> str:
    """`text` without null characters and with lone surrogates as U+FFFD, so that it can be written as UTF-8."""
    if "\x00" in text:
        text = text.replace("\x00", "")
        if log is not None:
            log.repair("null_bytes")
    mended = without_surrogates(text)
    if mended is not text and mended != text and log is not None:
        log.repair("lone_surrogates")
    return mended


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
