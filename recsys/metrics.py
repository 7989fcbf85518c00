"""Ranking metrics on the whole evaluation set: AUC, GAUC, UAUC, logloss, calibration. Exact, ties counted half.

Shapes: n samples. A user (group) whose samples have one class only has no AUC and is left out of GAUC and UAUC.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from parallel.common.errors import UserError

CLIP = 1e-7


def auc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Area under the ROC curve: the share of (positive, negative) pairs ranked right, ties counted half.

    NaN where only one class is present. Equals the Mann-Whitney U statistic over the number of pairs.
    """
    order = np.argsort(scores, kind="stable")
    sorted_labels, sorted_scores = np.asarray(labels)[order] > 0, np.asarray(scores)[order]
    return _auc_of_sorted(sorted_labels, sorted_scores)


def _auc_of_sorted(labels: np.ndarray, scores: np.ndarray) -> float:
    ends = _last_of_ties(scores)
    positives = np.cumsum(labels)[ends]
    totals = ends + 1
    negatives = totals - positives
    if len(ends) == 0 or positives[-1] == 0 or negatives[-1] == 0:
        return float("nan")
    tied_positives, tied_negatives = np.diff(positives, prepend=0), np.diff(negatives, prepend=0)
    below = negatives - tied_negatives
    # Twice the wins is an integer; only its last bits are lost in float64 beyond 2^53 pairs.
    twice = (tied_positives * (2 * below + tied_negatives)).astype(np.float64).sum()
    return float(twice / (2.0 * float(positives[-1]) * float(negatives[-1])))


def _last_of_ties(values: np.ndarray) -> np.ndarray:
    """Index of the last element of each run of equal values."""
    if len(values) == 0:
        return np.zeros(0, np.int64)
    return np.append(np.flatnonzero(values[1:] != values[:-1]), len(values) - 1)


@dataclass(frozen=True)
class GroupAuc:
    """AUC per user, put together in two ways."""

    gauc: float
    """Mean weighted by each user's number of samples (Zhu et al. 2017)."""
    uauc: float
    """Plain mean over users, as the RankMixer paper's UAUC."""
    users: int
    """Users with both classes."""
    left_out: int
    """Users with one class only."""


def group_auc(labels: np.ndarray, scores: np.ndarray, users: np.ndarray) -> GroupAuc:
    """AUC within each user, vectorised: one sort by (user, score), then sums by run. O(n log n), no loop over users."""
    labels, scores, users = np.asarray(labels) > 0, np.asarray(scores), np.asarray(users)
    if len(labels) == 0:
        return GroupAuc(float("nan"), float("nan"), 0, 0)
    order = np.lexsort((scores, users))
    labels, scores, users = labels[order], scores[order], users[order]
    new_user = np.concatenate([[True], users[1:] != users[:-1]])
    user_of = np.cumsum(new_user) - 1
    count = int(user_of[-1]) + 1
    run_starts = np.flatnonzero(np.concatenate([[True], (scores[1:] != scores[:-1]) | new_user[1:]]))
    tied_positives = np.add.reduceat(labels.astype(np.int64), run_starts)
    tied_negatives = np.diff(np.append(run_starts, len(labels))) - tied_positives
    run_user = user_of[run_starts]
    positives = np.bincount(run_user, tied_positives, count)
    negatives = np.bincount(run_user, tied_negatives, count)
    before = np.cumsum(tied_negatives) - tied_negatives
    first_run = np.searchsorted(run_user, np.arange(count))
    below = before - before[first_run][run_user]
    twice = np.bincount(run_user, tied_positives * (2.0 * below + tied_negatives), count)
    both = (positives > 0) & (negatives > 0)
    if not both.any():
        return GroupAuc(float("nan"), float("nan"), 0, count)
    aucs = twice[both] / (2.0 * positives[both] * negatives[both])
    weights = (positives + negatives)[both]
    return GroupAuc(float(np.average(aucs, weights=weights)), float(aucs.mean()), int(both.sum()),
                    count - int(both.sum()))


def logloss(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Mean negative log-likelihood in nats; probabilities are kept 1e-7 away from 0 and 1."""
    p = np.clip(np.asarray(probabilities, np.float64), CLIP, 1.0 - CLIP)
    y = np.asarray(labels) > 0
    return float(-np.where(y, np.log(p), np.log1p(-p)).mean()) if len(p) else float("nan")


def calibration(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Predicted over observed clicks; 1 is calibrated, above 1 predicts too many. NaN without a click."""
    clicks = float(np.sum(np.asarray(labels) > 0))
    return float(np.sum(probabilities, dtype=np.float64)) / clicks if clicks else float("nan")


def expected_calibration_error(labels: np.ndarray, probabilities: np.ndarray, bins: int = 20) -> float:
    """Mean absolute gap of predicted and observed click rate over equal slices of [0, 1] (Guo et al. 2017)."""
    p = np.asarray(probabilities, np.float64)
    if len(p) == 0:
        return float("nan")
    index = np.minimum((p * bins).astype(np.int64), bins - 1)
    clicks = np.bincount(index, np.asarray(labels) > 0, bins)
    return float(np.abs(np.bincount(index, p, bins) - clicks).sum() / len(p))


def bayes_auc(probabilities: np.ndarray) -> float:
    """Expected AUC of ranking by the true click probabilities: the highest that any model can expect.

    E[positive and negative pair ranked right] / E[pairs] with independent labels: pairs (i, j), i != j, have weight
    p_i (1 - p_j).
    """
    p = np.sort(np.asarray(probabilities, np.float64))
    ends = _last_of_ties(p)
    negatives = np.cumsum(1.0 - p)[ends]
    positives = np.cumsum(p)[ends]
    tied_negatives, tied_positives = np.diff(negatives, prepend=0.0), np.diff(positives, prepend=0.0)
    wins = (tied_positives * (negatives - tied_negatives + 0.5 * tied_negatives)).sum()
    itself = (p * (1.0 - p)).sum()
    return float((wins - 0.5 * itself) / (positives[-1] * negatives[-1] - itself))


@dataclass
class Accumulator:
    """Collects predictions batch by batch; `result` computes every metric exactly on all of them.

    Args:
        spill_bytes: beyond this many bytes the predictions go to a temporary file that is mapped back in, so that
            an evaluation of any length needs no more memory than the sort.
    """

    spill_bytes: int = 1 << 30
    _chunks: list[np.ndarray] = field(default_factory=list)
    _file: object = None
    _pending: int = 0
    _rejected: int = 0

    TYPE = np.dtype([("score", "<f8"), ("user", "<i8"), ("label", "u1")])

    def update(self, labels: np.ndarray, probabilities: np.ndarray, users: np.ndarray | None = None) -> None:
        """Adds a batch of n samples. users: integer ids; None puts all in one group."""
        chunk = np.empty(len(labels), self.TYPE)
        chunk["label"], chunk["score"] = np.asarray(labels) > 0, probabilities
        chunk["user"] = 0 if users is None else users
        finite = np.isfinite(chunk["score"])
        if not finite.all():
            self._rejected += int((~finite).sum())
            chunk = chunk[finite]
        self._chunks.append(chunk)
        self._pending += chunk.nbytes
        if self._pending > self.spill_bytes:
            self._spill()

    def _spill(self) -> None:
        if self._file is None:
            self._file = tempfile.NamedTemporaryFile(prefix="predictions-")  # noqa: SIM115 - lives as long as self
        for chunk in self._chunks:
            chunk.tofile(self._file)
        self._file.flush()
        self._chunks, self._pending = [], 0

    def predictions(self) -> np.ndarray:
        """All samples so far: structured array with fields score, user, label."""
        if self._file is None:
            return np.concatenate(self._chunks) if self._chunks else np.empty(0, self.TYPE)
        self._spill()
        return np.memmap(Path(self._file.name), self.TYPE, "r")

    def result(self) -> dict[str, float]:
        """auc, gauc, uauc, logloss, calibration, ece, samples, users.

        Raises:
            UserError: a prediction was not finite; a model that diverged has no metrics.
        """
        if self._rejected:
            raise UserError("predictions that are not finite: the model has diverged", where="evaluation",
                            value=self._rejected, hint="lower the learning rate")
        rows = self.predictions()
        labels, scores = rows["label"], rows["score"]
        groups = group_auc(labels, scores, rows["user"])
        return {"auc": auc(labels, scores), "gauc": groups.gauc, "uauc": groups.uauc,
                "logloss": logloss(labels, scores), "calibration": calibration(labels, scores),
                "ece": expected_calibration_error(labels, scores), "samples": len(rows), "users": groups.users}
