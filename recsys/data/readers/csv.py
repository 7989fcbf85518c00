"""Any CSV or TSV file with a header line; the config file lists the features."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recsys.data.readers import Reader
from recsys.data.readers._files import csv_tables, no_default_features, shards

if TYPE_CHECKING:
    from recsys.settings import DataSettings


def files_of(path: Path) -> list[Path]:
    """All shards, in order of their names."""
    return shards(path, (".csv", ".tsv", ".txt"))


def read(data: DataSettings, path: Path) -> Iterator[tuple[Any, str]]:
    """Tables of all shards in order of their names; `data.delimiter` parts the cells."""
    for file in files_of(path):
        yield from csv_tables(file, delimiter=data.delimiter, quoted=data.quoted)


READER = Reader(read, no_default_features, files=files_of)
