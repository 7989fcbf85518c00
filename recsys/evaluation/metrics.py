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
BINARY_METRICS = ("auc", "gauc", "uauc", "logloss", "calibration", "ece", "ne", "calibration_free_ne")
NUMBER_METRICS = ("mse", "mae", "xauc", "rauc")
"""Names that logs, settings and dashboards rely on: they are added to, never changed."""


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


def normalized_entropy(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Logloss over that of always predicting the observed click rate (He et al., ADKDD 2014, eq. 1). Below 1 is better
    than knowing the rate alone. NaN where only one class is present."""
    rate = float(np.mean(np.asarray(labels) > 0)) if len(labels) else 0.0
    if not 0.0 < rate < 1.0:
        return float("nan")
    return logloss(labels, probabilities) / -(rate * np.log(rate) + (1.0 - rate) * np.log1p(-rate))


def calibration_free_ne(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """NE after one number is added to all logits so that as many clicks are predicted as observed: what remains once
    calibration is put right. Others divide the entropies in other ways; this definition was chosen here."""
    if len(labels) == 0 or not 0 < np.sum(np.asarray(labels) > 0) < len(labels):
        return float("nan")
    p = np.clip(np.asarray(probabilities, np.float64), CLIP, 1.0 - CLIP)
    logits, rate = np.log(p) - np.log1p(-p), float(np.mean(np.asarray(labels) > 0))
    low, high = -60.0, 60.0
    for _ in range(100):
        middle = 0.5 * (low + high)
        if np.mean(1.0 / (1.0 + np.exp(-np.clip(logits + middle, -700, 700)))) < rate:
            low = middle
        else:
            high = middle
    return normalized_entropy(labels, 1.0 / (1.0 + np.exp(-np.clip(logits + low, -700, 700))))


def segmented_ne(labels: np.ndarray, probabilities: np.ndarray, segments: np.ndarray) -> dict[int, float]:
    """NE within each segment (an integer a sample), by segment; NaN where a segment has one class only."""
    labels, probabilities, segments = np.asarray(labels), np.asarray(probabilities), np.asarray(segments)
    return {int(segment): normalized_entropy(labels[segments == segment], probabilities[segments == segment])
            for segment in np.unique(segments)}


def inversions(values: np.ndarray) -> int:
    """Pairs i < j with values[i] > values[j]: O(n log n), bit by bit of the ranks, without a loop over n."""
    _, ranks = np.unique(np.asarray(values), return_inverse=True)
    total = 0
    for bit in reversed(range(max(1, int(ranks.max(initial=0)).bit_length()))):
        # Within each run of equal higher bits (kept together, in order): ones before a zero.
        high, one = ranks >> (bit + 1), (ranks >> bit) & 1
        order = np.argsort(high, kind="stable")
        high, one = high[order], one[order]
        before = np.cumsum(one) - one
        first = np.concatenate([[True], high[1:] != high[:-1]]) if len(high) else np.zeros(0, bool)
        base = before[np.flatnonzero(first)][np.cumsum(first) - 1] if len(high) else before
        total += int(((before - base) * (1 - one)).sum())
    return total


def xauc(values: np.ndarray, predictions: np.ndarray) -> float:
    """Share of pairs with different values that the predictions rank right, tied predictions counted half; NaN without
    such a pair. For labels of 0 and 1 it is the AUC (Zhan et al., KDD 2022, for watch time)."""
    values, predictions = np.asarray(values, np.float64), np.asarray(predictions, np.float64)
    n = len(values)
    order = np.lexsort((predictions, values))  # of equal values the smaller prediction first: no inversion among them
    wrong = inversions(predictions[order])
    pairs = n * (n - 1) // 2 - _tied_pairs(values)
    both = np.unique(np.stack([values, predictions], 1), axis=0, return_counts=True)[1].astype(np.int64)
    tied = _tied_pairs(predictions) - int((both * (both - 1) // 2).sum())
    return float((pairs - wrong - 0.5 * tied) / pairs) if pairs else float("nan")


def _tied_pairs(values: np.ndarray) -> int:
    counts = np.unique(values, return_counts=True)[1].astype(np.int64)
    return int((counts * (counts - 1) // 2).sum())


def rauc(values: np.ndarray, predictions: np.ndarray) -> float:
    """1 - inversions / all pairs: the share of pairs, ties included, that the predictions do not turn round."""
    n = len(values)
    order = np.lexsort((np.asarray(predictions), np.asarray(values)))
    pairs = n * (n - 1) // 2
    return 1.0 - inversions(np.asarray(predictions)[order]) / pairs if pairs else float("nan")


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
        """BINARY_METRICS, samples, users.

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
                "ece": expected_calibration_error(labels, scores), "ne": normalized_entropy(labels, scores),
                "calibration_free_ne": calibration_free_ne(labels, scores),
                "samples": len(rows), "users": groups.users}


class NumberAccumulator:
    """Collects predicted numbers batch by batch; `result` gives NUMBER_METRICS on all of them."""

    def __init__(self) -> None:
        self.values: list[np.ndarray] = []
        self.predictions: list[np.ndarray] = []

    def update(self, labels: np.ndarray, predictions: np.ndarray, users: np.ndarray | None = None) -> None:
        """Adds a batch of n samples; `users` is not used."""
        self.values.append(np.asarray(labels, np.float64))
        self.predictions.append(np.asarray(predictions, np.float64))

    def result(self) -> dict[str, float]:
        """NUMBER_METRICS, samples, users (0).

        Raises:
            UserError: a prediction was not finite.
        """
        values, found = np.concatenate(self.values), np.concatenate(self.predictions)
        if not np.isfinite(found).all():
            raise UserError("predictions that are not finite: the model has diverged", where="evaluation",
                            value=int((~np.isfinite(found)).sum()), hint="lower the learning rate")
        error = found - values
        empty = len(values) == 0
        return {"mse": float("nan") if empty else float((error**2).mean()),
                "mae": float("nan") if empty else float(np.abs(error).mean()),
                "xauc": xauc(values, found), "rauc": rauc(values, found), "samples": len(values), "users": 0}
