"""KuaiRand: standard logs of short videos (user_id, video_id, date, hourmin, time_ms, is_click, is_like, ...), joined
with user_features_*.csv and video_features_basic_*.csv of the same folder.

The two side tables are held in memory (their strings dictionary-encoded); the logs are streamed.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from parallel.common.errors import UserError
from recsys.data.features import Feature
from recsys.data.readers import Reader
from recsys.data.readers._files import csv_tables, ids
from recsys.data.readers._history import Histories, history_features, wanted

if TYPE_CHECKING:
    from recsys.settings import DataSettings

_USER = ["user_active_degree", "follow_user_num_range", "fans_user_num_range", "friend_user_num_range",
         "register_days_range", *(f"onehot_feat{i}" for i in range(18))]
_VIDEO = ["author_id", "video_type", "upload_type", "music_id", "visible_status"]


def features(data: DataSettings) -> list[Feature]:
    """User id and profile, tab and hour, video id and its basic features."""
    return [
        *ids(["user_id"], "user", "user", minimum_count=2),
        *ids(_USER[:5], "user", "activity"),
        *ids(_USER[5:], "user", "profile"),
        *ids(["tab", "hour"], "context", "context"),
        *ids(["video_id"], "item", "video", minimum_count=2),
        *ids(_VIDEO, "item", "content", minimum_count=2),
        Feature(name="video_duration", type="numeric", side="item", group="content", buckets=16),
        Feature(name="tag", type="multi", side="item", group="tags", separator=",", length=4),
        *history_features(data, "video_id"),
    ]


def read(data: DataSettings, path: Path) -> Iterator[tuple[Any, str]]:
    """Logs in order of their names, with the user's and the video's columns joined; histories count clicks.

    Raises:
        UserError: the folder holds no standard log.
    """
    logs = sorted(path.rglob("log_standard*.csv*"))
    if not logs:
        raise UserError("no log_standard*.csv here", where="data.path", value=str(path))
    users = _side_table(path, "user_features*.csv*", "user_id", _USER)
    videos = _side_table(path, "video_features_basic*.csv*", "video_id", [*_VIDEO, "video_duration", "tag"])
    histories = Histories(data) if wanted(data) else None
    for file in logs:
        for table, where in csv_tables(file):
            if histories is not None:
                table = _with_histories(table, histories, where)
            if "hourmin" in table.column_names:
                minutes = pc.utf8_lpad(table.column("hourmin"), 4, "0")
                table = table.append_column("hour", pc.utf8_slice_codeunits(minutes, 0, 2))
            yield _join(_join(table, users, "user_id"), videos, "video_id"), where


def _with_histories(table: pa.Table, histories: Histories, where: str) -> pa.Table:
    missing = {"user_id", "video_id", "time_ms", "is_click"} - set(table.column_names)
    if missing:
        raise UserError(f"column '{sorted(missing)[0]}' is missing", where=where, hint="histories need it")
    try:
        times, clicks = (table.column(name).cast(pa.int64()).to_numpy() for name in ("time_ms", "is_click"))
    except pa.ArrowInvalid as error:
        raise UserError(f"time_ms or is_click is not a number: {error}", where=where) from None
    return histories.add(table, table.column("user_id"), table.column("video_id"), times, clicks, where)


def _side_table(path: Path, pattern: str, key: str, wanted: list[str]) -> pa.Table:
    tables = [table for file in sorted(path.rglob(pattern)) for table, _ in csv_tables(file)]
    if not tables:
        raise UserError(f"no {pattern} here", where="data.path", value=str(path))
    table = pa.concat_tables(tables)
    if key not in table.column_names:
        raise UserError(f"column '{key}' is missing", where=path / pattern)
    return table.select([key, *(name for name in wanted if name in table.column_names)])


def _join(log: pa.Table, side: pa.Table, key: str) -> pa.Table:
    if key not in log.column_names:
        return log
    index = pc.index_in(log.column(key).combine_chunks(), value_set=side.column(key).combine_chunks())
    for name in side.column_names:
        if name != key and name not in log.column_names:
            log = log.append_column(name, side.column(name).combine_chunks().take(index))
    return log


READER = Reader(read, features, labels=["is_click"], user="user_id", time="time_ms", split_by="time", histories=True)
