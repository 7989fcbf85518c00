"""Progressive validation: every batch is scored before it is trained on, so each sample is a test sample once.

Metrics are those of sliding windows of the newest samples. Source: Blum, Kalai and Langford, Beating the hold-out
(1999), and the usual practice of online learning of click models (McMahan et al. 2013).
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from parallel.training.backend import Backend
from parallel.training.companions import Companion
from recsys.evaluation.metrics import auc, calibration, logloss, normalized_entropy
from recsys.evaluation.score_merging import RankScores


class Window:
    """The newest samples of one task, at most `size`."""

    def __init__(self, size: int) -> None:
        self.scores, self.labels = np.zeros(size, np.float32), np.zeros(size, np.uint8)
        self.next, self.full = 0, False

    def add(self, scores: np.ndarray, labels: np.ndarray) -> None:
        """Takes samples in order; the oldest make room."""
        size = len(self.scores)
        scores, labels = scores[-size:], labels[-size:]
        places = (self.next + np.arange(len(scores))) % size
        self.scores[places], self.labels[places] = scores, labels > 0
        self.full |= self.next + len(scores) >= size
        self.next = (self.next + len(scores)) % size

    def newest(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(labels, scores) of the newest `count` samples, the oldest first; fewer where there are fewer."""
        have = len(self.scores) if self.full else self.next
        places = (self.next - min(count, have) + np.arange(min(count, have))) % len(self.scores)
        return self.labels[places], self.scores[places]

    def packed(self) -> str:
        """As text."""
        labels, scores = self.newest(len(self.scores))
        return base64.b64encode(zlib.compress(scores.tobytes() + np.packbits(labels).tobytes(), 1)).decode()

    def unpack(self, text: str, count: int) -> None:
        """Takes what `packed` gave of `count` samples."""
        raw = zlib.decompress(base64.b64decode(text))
        scores = np.frombuffer(raw[:4 * count], np.float32)
        self.add(scores, np.unpackbits(np.frombuffer(raw[4 * count:], np.uint8))[:count])


class Progressive(Companion):
    """Scores batches before their steps; callable as `evaluate(step) -> dict` by the trainer.

    Args:
        backend: scores with the parameters as they are.
        labels: names of the tasks; the first one's metrics have plain names, those of others end in `_<label>`.
        windows: sizes, in samples.
    """

    name = "progressive"

    def __init__(self, backend: Backend, labels: Sequence[str], windows: Sequence[int]) -> None:
        self.scores, self.labels, self.sizes = RankScores(backend), list(labels), sorted(set(windows))
        self.kept = [Window(self.sizes[-1]) for _ in self.labels]
        self.samples = 0

    def before_step(self, step: int, batch: Sequence[np.ndarray]) -> None:
        """Scores the batch with the parameters of `step`."""
        ids, numbers, labels = batch[:3]
        scores, labels = self.scores.of_batch((ids, numbers), labels)
        self.samples += len(labels)
        for task, window in enumerate(self.kept):
            window.add(scores[:, task], labels[:, task])

    def __call__(self, step: int) -> dict[str, float]:
        """auc, ne, logloss, calibration over each window (`auc_10000`), and over the largest under plain names."""
        metrics = {}
        for label, window in zip(self.labels, self.kept, strict=True):
            ending = f"_{label}" if label != self.labels[0] else ""
            for size in self.sizes:
                found = window_metrics(*window.newest(size))
                metrics.update({f"{name}_{size}{ending}": value for name, value in found.items()})
            metrics.update({f"{name}{ending}": value for name, value in found.items()})
        return metrics

    def state(self, step: int) -> dict[str, Any]:
        """The largest window of every task."""
        return {"samples": self.samples, "windows": [[len(window.newest(1 << 62)[0]), window.packed()]
                                                     for window in self.kept]}

    def restore(self, state: dict[str, Any]) -> None:
        """See `Companion`."""
        self.samples = int(state["samples"])
        for window, (count, text) in zip(self.kept, state["windows"], strict=True):
            window.unpack(text, int(count))


def window_metrics(labels: np.ndarray, scores: np.ndarray) -> dict[str, float]:
    """auc, ne, logloss and calibration of `recsys.evaluation.metrics`."""
    return {"auc": auc(labels, scores), "ne": float(normalized_entropy(labels, scores)),
            "logloss": logloss(labels, scores), "calibration": calibration(labels, scores)}
