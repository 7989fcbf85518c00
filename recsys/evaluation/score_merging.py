"""Scores of all ranks together: exact metrics of rows that were split over the ranks of a run.

A backend's `exchange` adds lists of floats over all ranks and gives back exactly what only one rank gives, so every
rank puts its rows at their index among zeros.
"""

from __future__ import annotations

import numpy as np

from parallel.training.backend import Backend

_VALUES_AT_ONCE = 1 << 22


class RankScores:
    """Brings together what the ranks of a data-parallel run know of their rows.

    Args:
        backend: of this process.
    """

    def __init__(self, backend: Backend) -> None:
        self.backend, (self.part, self.parts) = backend, backend.share

    def gathered(self, own: np.ndarray | None, shape: tuple[int, int], start: int) -> np.ndarray:
        """float32 [rows, K] of which this rank gives `own` from row `start` on; None: another rank gives its rows.
        Every rank calls it with the same shape."""
        result = np.zeros(shape, np.float32)
        if own is not None:
            result[start:start + len(own)] = own
        if self.backend.ranks == 1:
            return result
        flat = result.reshape(-1)
        for begin in range(0, flat.size, _VALUES_AT_ONCE):
            chunk = slice(begin, begin + _VALUES_AT_ONCE)
            flat[chunk] = self.backend.exchange(flat[chunk].tolist())
        return result

    def of_batch(self, batch: tuple[np.ndarray, ...], labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(probabilities, labels) [B, K] of a global batch, on every rank.

        Args:
            batch: this rank's rows, without labels.
            labels: of the same rows [n, K].
        """
        scores = self.backend.scores(batch)
        if self.backend.ranks == 1:
            return scores, labels
        rows, tasks = len(labels) * self.parts, labels.shape[1]
        own = None if scores is None else np.concatenate([scores, labels], 1)
        found = self.gathered(own, (rows, 2 * tasks), self.part * len(labels))
        return found[:, :tasks], found[:, tasks:]
