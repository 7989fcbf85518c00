"""MovieLens-100k in the atomic-file layout: ml-100k.inter, .user, .item (tab-separated, header `name:type`).

The label is rating >= 4; rows come in order of time (then user, then item), so a split by order is chronological.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from parallel.common.errors import UserError
from recsys.data.features import Feature
from recsys.data.readers import Reader
from recsys.data.readers._files import csv_tables, ids
from recsys.data.readers._history import Histories, history_features, wanted

if TYPE_CHECKING:
    from recsys.settings import DataSettings

LIKED = 4.0


def features(data: DataSettings) -> list[Feature]:
    """User id, age, gender, occupation, zip; item id, year, genres: the features of the usual baselines."""
    return [
        *ids(["user_id"], "user", "user"),
        Feature(name="age", type="numeric", side="user", group="profile", buckets=12),
        *ids(["gender", "occupation"], "user", "profile"),
        *ids(["zip_code"], "user", "place", minimum_count=2),
        *ids(["item_id"], "item", "item", minimum_count=2),
        *ids(["release_year"], "item", "year"),
        Feature(name="class", type="multi", side="item", group="genres", length=6),
        *history_features(data, "item_id"),
    ]


def read(data: DataSettings, path: Path) -> Iterator[tuple[Any, str]]:
    """One table: ratings with the user's and the item's columns joined, and `label`.

    Raises:
        UserError: a file is missing, or a rating is no number.
    """
    ratings = _table(path, ".inter")
    users, items = _table(path, ".user"), _table(path, ".item")
    for name in ("user_id", "item_id", "rating", "timestamp"):
        if name not in ratings.column_names:
            raise UserError(f"column '{name}' is missing", where=path / "*.inter")
    try:
        rating = ratings.column("rating").cast(pa.float64())
        when = ratings.column("timestamp").cast(pa.float64()).to_numpy()
    except pa.ArrowInvalid as error:
        raise UserError(f"rating or timestamp is not a number: {error}", where=path / "*.inter") from None
    ratings = ratings.append_column("label", pc.greater_equal(rating, LIKED).cast(pa.int8()))
    order = np.lexsort((*(np.asarray(ratings.column(name).to_pylist(), object).astype(str).astype("U12")
                          for name in ("item_id", "user_id")), when))
    ratings = ratings.take(pa.array(order))
    if wanted(data):
        ratings = Histories(data).add(ratings, ratings.column("user_id"), ratings.column("item_id"), when[order],
                                      ratings.column("label").to_numpy(), str(path))
    yield _join(_join(ratings, users, "user_id"), items, "item_id"), str(path)


def _table(path: Path, suffix: str) -> pa.Table:
    files = sorted(path.glob(f"*{suffix}")) if path.is_dir() else []
    if not files:
        raise UserError(f"no *{suffix} file here", where="data.path", value=str(path),
                        hint="give the folder of ml-100k.inter, .user and .item")
    tables = [table for table, _ in csv_tables(files[0], delimiter="\t", quoted=False)]
    if not tables:
        raise UserError("the file is empty", where=files[0], hint="fetch it again")
    table = pa.concat_tables(tables)
    return table.rename_columns([name.partition(":")[0] for name in table.column_names]).combine_chunks()


def _join(log: pa.Table, side: pa.Table, key: str) -> pa.Table:
    if key not in side.column_names:
        raise UserError(f"column '{key}' is missing", where=f"data.path, the file of {key.partition('_')[0]}s")
    index = pc.index_in(log.column(key).combine_chunks(), value_set=side.column(key).combine_chunks())
    for name in side.column_names:
        if name != key:
            log = log.append_column(name, side.column(name).combine_chunks().take(index))
    return log


READER = Reader(read, features, user="user_id", time="timestamp", histories=True)
