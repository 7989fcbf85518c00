"""What a user liked before: a column that logs without histories do not have."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
import pyarrow as pa

from recsys.features import Feature


class Histories:
    """The items that each user liked strictly before the row's time, newest last; memory grows with the users.

    Rows must come in order of time for each user (others between do no harm); rows of one moment do not see each other.

    Args:
        length: items kept.
    """

    def __init__(self, length: int) -> None:
        self.length = length
        self.liked: dict[Any, deque] = {}
        self.waiting: dict[Any, tuple[Any, list]] = {}

    def add(self, users: pa.Array, items: pa.Array, times: np.ndarray, liked: np.ndarray) -> pa.Array:
        """The histories of some rows, as lists of text; then takes the rows into account."""
        offsets, values = [0], []
        for user, item, time, like in zip(users.to_pylist(), items.to_pylist(), times.tolist(), liked.tolist(),
                                          strict=True):
            known = self._until(user, time)
            values.extend(known)
            offsets.append(len(values))
            if like and user is not None and item is not None:
                self.waiting.setdefault(user, (time, []))[1].append(str(item))
        return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values, pa.string()))

    def _until(self, user: Any, time: Any) -> deque:
        known = self.liked.setdefault(user, deque(maxlen=self.length))
        if user in self.waiting and self.waiting[user][0] != time:
            known.extend(self.waiting.pop(user)[1])
        return known


def history_feature(data: Any, target: str) -> list[Feature]:
    """The feature `history` for `data.history` items, weighed by the candidate (DIN); none where it is 0."""
    if not data.history:
        return []
    return [Feature(name="history", type="sequence", side="cross", group="history", target=target,
                    length=data.history, pooling="attention")]
