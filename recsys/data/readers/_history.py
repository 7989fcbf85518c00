"""What a user liked before, met without liking it, and how often: columns that logs without histories do not have."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from parallel.common.errors import UserError
from recsys.data.features import Feature

if TYPE_CHECKING:
    from recsys.settings import DataSettings

HISTORY, PASSED, RATE = "history", "passed", "like_rate"


class Histories:
    """The items that each user liked, and those met but not liked, strictly before the row's time, newest last, and the
    share of liked ones among all of them; memory grows with the users.

    The share is (liked + 1) / (met + 2), missing for a user who has met nothing.

    Rows must come in order of time for each user (others between do no harm); rows of one moment do not see each other.

    Args:
        data: `data.history` and `data.passed`: how many items of each kind are kept; `data.like_rate`.
    """

    def __init__(self, data: DataSettings) -> None:
        self.lengths = {name: length for name, length in ((HISTORY, data.history), (PASSED, data.passed)) if length}
        self.with_rate = data.like_rate
        self.known: dict[Any, dict[str, deque]] = {}
        self.counts: dict[Any, list[int]] = {}
        self.waiting: dict[Any, tuple[Any, list]] = {}

    def add(self, table: pa.Table, users: pa.Array, items: pa.Array, times: np.ndarray, liked: np.ndarray,
            where: str) -> pa.Table:
        """The table with the histories of its rows as lists of text; then takes the rows into account.

        Raises:
            UserError: a user's rows do not come in order of time, so that histories would hold the future.
        """
        made: dict[str, tuple[list, list]] = {name: ([0], []) for name in self.lengths}
        rates: list[float | None] = []
        rows = zip(users.to_pylist(), items.to_pylist(), times.tolist(), liked.tolist(), strict=True)
        for number, (user, item, time, like) in enumerate(rows, 1):
            known = self._until(user, time, f"{where}, row {number} of this piece")
            for name, (offsets, values) in made.items():
                values.extend(known[name])
                offsets.append(len(values))
            count = self.counts.get(user, [0, 0])
            rates.append((count[1] + 1) / (sum(count) + 2) if any(count) else None)
            if user is not None and item is not None:
                self.waiting.setdefault(user, (time, []))[1].append((HISTORY if like else PASSED, str(item)))
        for name, (offsets, values) in made.items():
            lists = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values, pa.string()))
            table = table.append_column(name, lists)
        return table.append_column(RATE, pa.array(rates, pa.float64())) if self.with_rate else table

    def _until(self, user: Any, time: Any, where: str) -> dict[str, deque]:
        if user not in self.known:
            self.known[user] = {name: deque(maxlen=length) for name, length in self.lengths.items()}
        known = self.known[user]
        waiting = self.waiting.get(user)
        if waiting is not None and waiting[0] != time:
            if time < waiting[0]:
                raise UserError("a user's rows do not come in order of time", where=where, value=user,
                                hint="sort the log by time, or do without data.history and data.passed")
            count = self.counts.setdefault(user, [0, 0])
            for kind, item in self.waiting.pop(user)[1]:
                count[kind == HISTORY] += 1
                if kind in known:
                    known[kind].append(item)
        return known


def history_features(data: DataSettings, target: str) -> list[Feature]:
    """The features `history` and `passed`, weighed by the candidate (DIN), and `like_rate`, as the settings say."""
    lengths = {HISTORY: data.history, PASSED: data.passed}
    lists = [Feature(name=name, type="sequence", side="cross", group=name, target=target, length=length,
                     pooling="attention") for name, length in lengths.items() if length]
    rate = Feature(name=RATE, type="numeric", side="user", group=RATE, buckets=16)
    return [*lists, rate] if data.like_rate else lists


def wanted(data: DataSettings) -> bool:
    """Whether the settings ask for any of it."""
    return bool(data.history or data.passed or data.like_rate)
