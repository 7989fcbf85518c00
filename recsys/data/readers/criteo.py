"""Criteo display advertising: label, 13 counts I1..I13, 26 hashed categories C1..C26 (no user, in order of time).

The Kaggle file is tab-separated without a header; samples in circulation are CSV with one. Both are read. The meaning
of the columns was never published, so the groups are consecutive runs of columns; chosen here.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parallel.common.files import open_utf8
from recsys.data.features import Feature
from recsys.data.readers import Reader
from recsys.data.readers._files import csv_tables, ids, shards

if TYPE_CHECKING:
    from recsys.settings import DataSettings

NAMES = ["label", *(f"I{i}" for i in range(1, 14)), *(f"C{i}" for i in range(1, 27))]


def features(data: DataSettings) -> list[Feature]:
    """Counts in 32 quantiles; categories seen twice or more; groups of 7 to 9 columns."""
    counts = [Feature(name=f"I{i}", type="numeric", transform="bucket", buckets=32, side="context",
                      group=f"counts_{(i - 1) // 7}") for i in range(1, 14)]
    categories = [feature for i in range(1, 27)
                  for feature in ids([f"C{i}"], "context", f"categories_{(i - 1) // 7}", minimum_count=2)]
    return counts + categories


def files_of(path: Path) -> list[Path]:
    """All shards, in order of their names."""
    return shards(path, (".csv", ".txt", ".tsv"))


def read(data: DataSettings, path: Path) -> Iterator[tuple[Any, str]]:
    """Tables of the file or of all shards in a folder."""
    for file in files_of(path):
        with open_utf8(file) as stream:
            headed = stream.read(5) == b"label"
        delimiter = "," if ".csv" in file.suffixes else "\t"
        yield from csv_tables(file, delimiter=delimiter, names=None if headed else NAMES, quoted=False)


READER = Reader(read, features, files=files_of)
