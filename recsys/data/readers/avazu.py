"""Avazu clicks: 24 columns, `click` the label, `hour` as YYMMDDHH; without a user id, the device is used."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from recsys.data.features import Feature
from recsys.data.readers import Reader
from recsys.data.readers._files import csv_tables, ids, shards

if TYPE_CHECKING:
    from recsys.settings import DataSettings


def features(data: DataSettings) -> list[Feature]:
    """All columns but the row id; the hour is split into hour of day and day."""
    return [
        *ids(["device_id", "device_ip"], "user", "device", minimum_count=2),
        *ids(["device_model", "device_type", "device_conn_type"], "user", "model"),
        *ids(["hour_of_day", "day", "banner_pos"], "context", "context"),
        *ids(["site_id", "site_domain", "site_category"], "item", "site"),
        *ids(["app_id", "app_domain", "app_category"], "item", "app"),
        *ids(["C1", "C14", "C15", "C16"], "item", "creative"),
        *ids(["C17", "C18", "C19", "C20", "C21"], "item", "campaign"),
    ]


def files_of(path: Path) -> list[Path]:
    """All shards, in order of their names."""
    return shards(path, (".csv", ".txt"))


def read(data: DataSettings, path: Path) -> Iterator[tuple[Any, str]]:
    """Tables with `hour` split into `hour_of_day` and `day`."""
    for file in files_of(path):
        for table, where in csv_tables(file):
            if "hour" in table.column_names:
                hour = table.column("hour").cast(pa.string())
                table = table.append_column("hour_of_day", pc.utf8_slice_codeunits(hour, 6, 8))
                table = table.append_column("day", pc.utf8_slice_codeunits(hour, 4, 6))
            yield table, where


READER = Reader(read, features, labels=["click"], files=files_of)
