"""Any parquet files, with native lists for multi-value features; the config file lists the features."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recsys.data.readers import Reader
from recsys.data.readers._files import no_default_features, parquet_tables, shards

if TYPE_CHECKING:
    from recsys.settings import DataSettings


def files_of(path: Path) -> list[Path]:
    """All shards, in order of their names."""
    return shards(path, (".parquet", ".pq"))


def read(data: DataSettings, path: Path) -> Iterator[tuple[Any, str]]:
    """Tables of all shards in order of their names."""
    for file in files_of(path):
        yield from parquet_tables(file)


READER = Reader(read, no_default_features, files=files_of)
