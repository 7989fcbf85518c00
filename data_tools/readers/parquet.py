"""Parquet with a text column; files written here keep further keys as JSON in the column `other`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parallel.common.structured import BadText, parse_object

if TYPE_CHECKING:
    from data_tools.records import Document, ReadLog, ReadSettings, Split

SUFFIXES = (".parquet",)
_BATCH_ROWS = 256


def ranges(path: Path, settings: ReadSettings) -> list[tuple[int, int | None]]:
    """Ranges of row groups of about `split_bytes` compressed bytes; a damaged file is one part (and reported when
    read)."""
    from pyarrow import parquet

    try:
        groups = parquet.ParquetFile(_opened(path)).metadata.num_row_groups
    except _damage():
        return [(0, None)]
    parts = max(1, min(groups, path.stat().st_size // settings.split_bytes))
    edges = [groups * part // parts for part in range(parts)] + [groups]
    return list(zip(edges[:-1], edges[1:], strict=True))


def read(split: Split, settings: ReadSettings, log: ReadLog) -> Iterator[Document]:
    """The documents of the row groups of the split."""
    from pyarrow import parquet

    from data_tools.readers._build import build_document, default_source

    if os.path.getsize(split.path) == 0:
        log.damaged("empty_file", split.path, "0 bytes")
        return
    try:
        file = parquet.ParquetFile(_opened(split.path))
        if settings.text_key not in file.schema_arrow.names:
            log.damaged("no_text_column", split.path, f"columns: {', '.join(file.schema_arrow.names)}")
            return
        end = file.metadata.num_row_groups if split.end is None else split.end
        for group in range(split.start, end):
            row = 0
            for batch in file.iter_batches(_BATCH_ROWS, row_groups=[group]):
                for record in _records(batch):
                    name = f"{split.name}:{group}.{row}"
                    row += 1
                    document = build_document(_unfold(record), name, split, settings, log)
                    if document is not None:
                        yield document
    except _damage() as error:
        log.damaged("truncated", split.path, f"{default_source(split, settings)}: {type(error).__name__}: {error}")


def _opened(path: str | Path) -> Any:
    """The file for pyarrow, whose own opening knows names in UTF-8 only."""
    import pyarrow

    return pyarrow.OSFile(os.fsencode(path))


def _damage() -> tuple[type[Exception], ...]:
    """What a damaged file raises, wherever it is damaged."""
    import pyarrow

    return (pyarrow.ArrowException, OSError, ValueError, MemoryError, OverflowError, KeyError, TypeError)


def _records(batch: Any) -> list[dict[str, Any]]:
    """The rows; columns that Python's types cannot hold (times in nanoseconds, years above 9999) as text."""
    import pyarrow

    columns = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            columns[name] = column.to_pylist()
        except UnicodeDecodeError:
            columns[name] = [value.decode("utf-8", "replace") if value is not None else None
                             for value in column.cast(pyarrow.binary()).to_pylist()]
        except (ValueError, OverflowError):
            columns[name] = column.cast(pyarrow.string()).to_pylist()
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _unfold(record: dict[str, Any]) -> dict[str, Any]:
    """Puts the further keys back that are kept in `other` (`data_tools.documents`), and drops empty columns."""
    other = record.pop("other", None)
    record = {key: value for key, value in record.items() if value is not None}
    if isinstance(other, str):
        try:
            record.update(parse_object(other))
        except BadText:
            record["other"] = other
    return record
