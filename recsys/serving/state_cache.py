"""User states kept across requests: bounded in number, bytes and age, least recently used out first, never another
user's. No MindSpore."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable

import numpy as np


def user_key(version: int, ids_m: np.ndarray, numbers_n: np.ndarray) -> bytes:
    """What a state depends on: the model's version and the user's full row, not a digest, so that two users never
    meet in one key."""
    return version.to_bytes(8, "little") + ids_m.tobytes() + numbers_n.tobytes()


class StateCache:
    """States by `user_key`, for any number of threads.

    Args:
        capacity: states at most; 0 keeps none.
        most_bytes: of states and their keys at most; None = any.
        seconds: how long a state is used after it was computed; None = until it leaves for another reason.
        clock: seconds that only rise.
    """

    def __init__(self, capacity: int, most_bytes: int | None = None, seconds: float | None = None,
                 clock: Callable[[], float] = time.monotonic) -> None:
        self.capacity, self.most_bytes, self.seconds, self.clock = capacity, most_bytes, seconds, clock
        self.hits = self.misses = self.bytes = 0
        self._states: OrderedDict[bytes, tuple[np.ndarray, float]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: bytes) -> np.ndarray | None:
        """The state, or None."""
        with self._lock:
            state, made = self._states.get(key, (None, 0.0))
            if state is not None and self.seconds is not None and self.clock() - made > self.seconds:
                self._remove(key)
                state = None
            if state is None:
                self.misses += 1
                return None
            self._states.move_to_end(key)
            self.hits += 1
            return state

    def put(self, key: bytes, state: np.ndarray) -> None:
        """Keeps a state, which must not be changed any more."""
        if self.capacity == 0:
            return
        state.flags.writeable = False
        with self._lock:
            if key in self._states:
                self._remove(key)
            self._states[key] = state, self.clock()
            self.bytes += _size(key, state)
            while len(self._states) > self.capacity or self.bytes > (self.most_bytes or self.bytes):
                self._remove(next(iter(self._states)))

    def _remove(self, key: bytes) -> None:
        state, _ = self._states.pop(key)
        self.bytes -= _size(key, state)

    def clear(self) -> None:
        """Forgets all states (the model changed)."""
        with self._lock:
            self._states.clear()
            self.bytes = 0

    def __len__(self) -> int:
        return len(self._states)

    @property
    def hit_rate(self) -> float:
        """Hits over lookups since the start."""
        total = self.hits + self.misses
        return self.hits / total if total else 0.0


def _size(key: bytes, state: np.ndarray) -> int:
    return len(key) + state.nbytes
