"""Frappe (app usage in context) as libfm text: `label index:1 index:1 ...`, ten fields a line.

The files give no field names; index i belongs to the field of the same position in the order of the published
converter: user, item, daytime, weekday, weekend, homework, cost, weather, country, city. Label -1 counts as 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from parallel.common.errors import UserError
from parallel.common.lines import text_lines
from recsys.data.features import Feature
from recsys.data.readers import Reader
from recsys.data.readers._files import ROWS_AT_ONCE, ids, shards

if TYPE_CHECKING:
    from recsys.settings import DataSettings

FIELDS = ["user", "item", "daytime", "weekday", "isweekend", "homework", "cost", "weather", "country", "city"]


def features(data: DataSettings) -> list[Feature]:
    """Ten ids in five groups."""
    return [
        *ids(["user"], "user", "user"), *ids(["country", "city"], "user", "place"),
        *ids(["daytime", "weekday", "isweekend"], "context", "time"),
        *ids(["homework", "weather"], "context", "context"),
        *ids(["item", "cost"], "item", "item"),
    ]


def read(data: DataSettings, path: Path) -> Iterator[tuple[Any, str]]:
    """Tables of all .libfm files in order of their names.

    Raises:
        UserError: a line of another form, a damaged archive, not UTF-8.
    """
    for file in shards(path, (".libfm", ".txt")):
        yield from _tables(file)


def _tables(file: Path) -> Iterator[tuple[Any, str]]:
    columns: list[list[str]] = [[] for _ in range(len(FIELDS) + 1)]
    for number, line in text_lines(file):
        cells = line.split()
        if len(cells) != len(FIELDS) + 1:
            raise UserError(f"a line has a label and {len(FIELDS)} fields", where=f"{file}, line {number}",
                            value=line.strip())
        columns[0].append("0" if cells[0] in ("-1", "0", "-1.0", "0.0") else cells[0])
        for place, cell in enumerate(cells[1:], 1):
            columns[place].append(cell.partition(":")[0])
        if len(columns[0]) == ROWS_AT_ONCE:
            yield pa.table(dict(zip(["label", *FIELDS], columns, strict=True))), str(file)
            columns = [[] for _ in columns]
    if columns[0]:
        yield pa.table(dict(zip(["label", *FIELDS], columns, strict=True))), str(file)


READER = Reader(read, features, user="user", split_by="random")
