"""The TAAC layout: parquet whose columns have their meaning in a prefix, sequences as native lists.

    user_* context_* item_* cross_*        ids (integers or text), numbers (floating point), sets (lists)
    seq_<name>                             sequences in order of time, newest last
    label or label_<task>, timestamp, user_id, item_id

Column names differ between the rounds of the contest; this reader takes the prefixes as its contract (chosen
here) and reads types from the file. A column that fits no prefix is left out with a note.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as parquet

from parallel.common.errors import UserError
from parallel.common.progress import info
from recsys.data.features import Feature
from recsys.data.readers import Reader
from recsys.data.readers._files import parquet_tables, shards

if TYPE_CHECKING:
    from recsys.settings import DataSettings

_SIDES = {"user_": "user", "context_": "context", "item_": "item", "cross_": "cross"}


def features(data: DataSettings) -> list[Feature]:
    """One feature a column, read from the schema of the first file that is not empty.

    Raises:
        UserError: no path, or no readable file there.
    """
    if data.path is None:
        raise UserError("reader taac needs a path", where="data.path", hint="set data.path=...")
    schema = _schema(shards(Path(data.path), (".parquet",)))
    found, left_out = [], []
    for field in schema:
        side = next((side for prefix, side in _SIDES.items() if field.name.startswith(prefix)), None)
        if field.name.startswith("seq_"):
            found.append(Feature(name=field.name, type="sequence", side="user", group="sequence", values="hash",
                                 rows=1 << 17, length=64))
        elif side is not None:
            found.append(_feature(field, side))
        elif not field.name.startswith("label") and field.name != "timestamp":
            left_out.append(field.name)
    if left_out:
        info(f"columns without a known prefix are left out: {', '.join(left_out)}")
    return found


def _schema(files: list[Path]) -> pa.Schema:
    file = next((file for file in files if file.stat().st_size), None)
    if file is None:
        raise UserError("all files are empty", where="data.path", value=str(files[0].parent))
    try:
        return parquet.read_schema(file)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"not a complete parquet file: {error}", where=file, hint="fetch it again") from None


def _feature(field: pa.Field, side: str) -> Feature:
    if pa.types.is_floating(field.type):
        return Feature(name=field.name, type="numeric", side=side, group=f"{side}_numbers")
    if pa.types.is_list(field.type) or pa.types.is_large_list(field.type):
        return Feature(name=field.name, type="multi", side=side, group=f"{side}_sets", values="hash", rows=1 << 16)
    return Feature(name=field.name, side=side, values="hash", rows=1 << 17)


def read(data: DataSettings, path: Path) -> Iterator[tuple[Any, str]]:
    """Tables of all shards in order of their names."""
    for file in shards(path, (".parquet",)):
        yield from parquet_tables(file)


READER = Reader(read, features, user="user_id", time="timestamp", split_by="time")
