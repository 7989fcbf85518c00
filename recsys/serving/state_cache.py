"""User states kept across requests: bounded, least recently used out first, never another user's. No MindSpore."""

from __future__ import annotations

import threading
from collections import OrderedDict

import numpy as np


def user_key(version: int, ids_m: np.ndarray, numbers_n: np.ndarray) -> bytes:
    """What a state depends on: the model's version and the user's row, whole, not a digest, so that two users never
    meet in one key."""
    return version.to_bytes(8, "little") + ids_m.tobytes() + numbers_n.tobytes()


class StateCache:
    """States by `user_key`, for any number of threads.

    Args:
        capacity: states at most; 0 keeps none.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity, self.hits, self.misses = capacity, 0, 0
        self._states: OrderedDict[bytes, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: bytes) -> np.ndarray | None:
        """The state, or None."""
        with self._lock:
            state = self._states.get(key)
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
            self._states[key] = state
            self._states.move_to_end(key)
            while len(self._states) > self.capacity:
                self._states.popitem(last=False)

    def clear(self) -> None:
        """Forgets all states (the model changed)."""
        with self._lock:
            self._states.clear()

    def __len__(self) -> int:
        return len(self._states)

    @property
    def hit_rate(self) -> float:
        """Hits over lookups since the start."""
        total = self.hits + self.misses
        return self.hits / total if total else 0.0
