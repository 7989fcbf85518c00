"""What a stream is made of: events, and the transports (Redis, Kafka, a folder) that bring them."""

from __future__ import annotations

import datetime
import math
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa

from parallel.common.errors import UserError
from parallel.common.structured import BadText, parse_object
from recsys.data.encode import Columns
from recsys.data.features import Feature
from recsys.data.times import seconds_of

Positions = dict[str, Any]
"""By partition (a Redis stream, a Kafka partition, a folder) where reading goes on: a JSON value of its transport."""


@dataclass(slots=True)
class Event:
    """One event.

    Args:
        partition: where it came from.
        after: the partition's position when the event has been read.
        time: event time in seconds.
        row: the columns.
        fault: (column, what, value) of a time that cannot be read: the row is bad.
    """

    partition: str
    after: Any
    time: float
    row: dict[str, Any]
    fault: tuple[str, str, Any] | None = None


class Transport(Protocol):
    """Brings events of some partitions, each in an order that never changes.

    Args:
        shared: whether the server moves partitions between the processes of a group while they read. Such a transport
            has two more members, which its reader sets: `hand_over(partitions)` and `take_over(positions)`.
    """

    shared: bool

    def begin(self) -> Positions:
        """Partitions, and where each begins: in front of its oldest event."""
        ...

    def open(self, positions: Positions) -> None:
        """Goes to these positions."""
        ...

    def poll(self, wanted: set[str], most: int, seconds: float) -> list[Event]:
        """Up to `most` events of each of the wanted partitions; waits up to `seconds` for the first.

        Raises:
            UserError: events are gone that were not read; the server is away for too long.
        """
        ...

    def commit(self, positions: Positions) -> bool:
        """A checkpoint holds everything in front of these positions; whether whoever shares the stream knows."""
        ...

    def close(self) -> None:
        """Leaves the server."""
        ...


class TimeOf:
    """Makes events, with the event time of their rows in seconds.

    Args:
        column: data.time; None = what the transport stamped.
        unit: data.stream.time_unit, of numbers.
    """

    def __init__(self, column: str | None, unit: str) -> None:
        self.column, self.factor = column, 1e-3 if unit == "milliseconds" else 1.0

    def event(self, partition: str, after: Any, row: dict[str, Any], stamped: float | None) -> Event:
        """An event at the time that the column holds, a number or a date (without a zone: UTC), else at `stamped`.

        A time that cannot be read must not pass for another one: the event has a `fault` then, as without a time where
        nothing is stamped.
        """
        value = row.get(self.column) if self.column is not None else None
        time = None if value in (None, "") else self._seconds(value)
        fault = None
        if self.column is not None and time is None and (value not in (None, "") or stamped is None):
            what = "no time" if value in (None, "") else "a time that is neither a number nor a date"
            fault = self.column, what, value
        return Event(partition, after, (stamped or 0.0) if time is None else time, row, fault)

    def _seconds(self, value: Any) -> float | None:
        if isinstance(value, datetime.date) and not isinstance(value, datetime.datetime):
            value = datetime.datetime(value.year, value.month, value.day)
        if isinstance(value, datetime.datetime):
            return value.timestamp() if value.tzinfo else value.replace(tzinfo=datetime.timezone.utc).timestamp()
        if isinstance(value, str) and (seconds := seconds_of(value)) is not None:
            return seconds if math.isfinite(seconds) else None
        try:
            time = float(value) * self.factor if not isinstance(value, bool) else math.nan
        except (TypeError, ValueError, OverflowError):
            return None
        return time if math.isfinite(time) else None


def read_object(text: str | bytes, where: str) -> dict[str, Any] | None:
    """A JSON object; None where it is anything else (the row is then bad).

    Raises:
        Nothing: what to do about bad rows is for the source to say.
    """
    try:
        return parse_object(text)
    except BadText:
        return None


# ---------------------------------------------------------------- from rows to columns


def text_of(value: Any) -> str | None:
    """A single value as the text that a file's column would hold: 3 and 3.0 are one value, NaN is missing.

    Raises:
        TypeError: a list or an object.
    """
    if value is None or isinstance(value, str):
        return value if value is None or value.isascii() else value.encode("utf-8", "replace").decode()
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        if math.isnan(value):
            return None
        return str(int(value)) if value.is_integer() and abs(value) < 2.0**53 else str(value)
    if isinstance(value, (list, dict)):
        raise TypeError
    return str(value)


def number_of(value: Any) -> float | str | None:
    """A number (text is left to be read later).

    Raises:
        TypeError: a list or an object.
    """
    if value is None or isinstance(value, (str, float)):
        return value
    if isinstance(value, (bool, int)):
        return float(value) if abs(value) < 1 << 1000 else math.inf
    if isinstance(value, datetime.datetime):
        return value.timestamp()
    raise TypeError


def list_of(value: Any, separator: str) -> list[str | None] | None:
    """A list of texts; text is split at the separator.

    Raises:
        TypeError: neither a list nor text.
    """
    if value is None:
        return None
    if isinstance(value, str):
        return value.strip().split(separator) if value.strip() else []
    if not isinstance(value, (list, tuple)):
        raise TypeError
    return [text_of(item) for item in value]


class Tables:
    """Makes a table of the columns that an `Encoder` reads out of events; a key that an event lacks is missing.

    Args:
        features, columns: of the run.
    """

    def __init__(self, features: list[Feature], columns: Columns) -> None:
        self.kinds: dict[str, tuple[str, str]] = {}
        for feature in features:
            kind = "list" if feature.is_list else "number" if feature.type == "numeric" else "text"
            self.kinds[feature.source] = (kind, feature.separator)
        for name in columns.labels:
            self.kinds[name] = ("number", "")
        if columns.user is not None:
            self.kinds.setdefault(columns.user, ("text", ""))
        self.seen: set[str] = set()

    def table(self, events: list[Event]) -> tuple[pa.Table, dict[int, tuple[str, str, Any]]]:
        """(the columns, bad rows: index -> (column, what is wrong, value); bad values are null in the table).

        Raises:
            UserError: a column that no event so far has.
        """
        rows, made, bad = [event.row for event in events], {}, {}
        if missing := set(self.kinds) - self.seen:
            self.seen.update(*(missing & row.keys() for row in rows))
            absent = sorted(set(self.kinds) - self.seen)
            if absent and rows:
                raise UserError(f"no event has '{absent[0]}'", where=events[0].partition,
                                value=sorted(rows[0])[:20], hint="null means a missing value; see data.features")
        for name, (kind, separator) in self.kinds.items():
            values = []
            for index, row in enumerate(rows):
                value = row.get(name)
                try:
                    values.append(list_of(value, separator) if kind == "list" else
                                  text_of(value) if kind == "text" else number_of(value))
                except TypeError:
                    bad.setdefault(index, (name, f"no {kind}", value))
                    values.append(None)
            made[name] = _array(kind, values)
        return pa.table(made), bad


def _array(kind: str, values: list) -> pa.Array:
    if kind == "list":
        return pa.array(values, pa.list_(pa.string()))
    if kind == "number" and not any(isinstance(value, str) for value in values):
        return pa.array(values, pa.float64())
    return pa.array([None if value is None else value if isinstance(value, str) else repr(value) for value in values],
                    pa.string())
