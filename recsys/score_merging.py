"""Scores of all ranks in one place: exact metrics of rows that were split over the ranks of a run.

A backend's `exchange` adds lists of floats over all ranks and gives back exactly what only one rank gives, so every
rank puts its rows into their places among zeros.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from parallel.training.device import DeviceSum, Processes

Exchange = Callable[[list[float]], list[float]]
_VALUES_AT_ONCE = 1 << 22


class RankScores:
    """Brings together what the ranks of a data-parallel run know of their rows.

    Args:
        exchange: see `parallel.training.backend.Backend.exchange`.
        part, parts: which consecutive share of every batch this process holds.
    """

    def __init__(self, exchange: Exchange, part: int, parts: int) -> None:
        self.exchange, self.part, self.parts = exchange, part, parts

    @classmethod
    def of(cls, processes: Processes) -> RankScores | None:
        """For the processes of a launch; None for a single one."""
        return cls(DeviceSum(processes.group), processes.rank, processes.ranks) if processes.ranks > 1 else None

    def whole(self, own: np.ndarray | None, rows: int, start: int) -> np.ndarray:
        """float32 [rows, K] of which this rank knows `own` from row `start` on (None where another rank tells them).

        Every rank calls it with the same `rows`.
        """
        width = 1 if own is None else int(np.prod(own.shape[1:], dtype=np.int64))
        width = int(max(self.exchange([float(width) if self.part == part else 0.0 for part in range(self.parts)])))
        result = np.zeros((rows, width), np.float32)
        if own is not None:
            result[start:start + len(own)] = np.asarray(own, np.float32).reshape(len(own), width)
        flat = result.reshape(-1)
        for begin in range(0, flat.size, _VALUES_AT_ONCE):
            piece = slice(begin, begin + _VALUES_AT_ONCE)
            flat[piece] = self.exchange(flat[piece].tolist())
        return result

    def whole_batch(self, scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(scores, labels) [B, K] of a global batch of which this rank holds its share."""
        rows, tasks = len(labels) * self.parts, scores.shape[1]
        found = self.whole(np.concatenate([scores, labels], 1), rows, self.part * len(labels))
        return found[:, :tasks], found[:, tasks:]
