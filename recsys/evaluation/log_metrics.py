"""Metrics of a model on a part of a log."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from mindspore import Tensor

from parallel.common.progress import progress
from parallel.training.backend import Backend
from recsys.data.batches import filled_batch, in_order
from recsys.data.encode import Encoded
from recsys.evaluation.score_merging import RankScores
from recsys.layers.tasks import TaskPlan
from recsys.ranker import Ranker, Scores
from recsys.training.validation import Prediction, metrics_of


class Evaluation:
    """Exact metrics on a part of a log; callable as `evaluate(step) -> dict` by the trainer.

    The first task's metrics have plain names, those of the others end in `_<label>`.

    Args:
        model: the ranker.
        rows: the part.
        labels: names of the tasks.
        batch: samples of one forward pass.
        prefix: put before every name.
        limit: batches at most; None = all.
        scores: what gives the probabilities; None = `Scores` of the model.
        plan: of the tasks; None = the model's.
        backend: of a run of several processes that each hold the model: they score the batches in turn, and every one
            knows all scores, which are those of one process to the bit.
    """

    def __init__(self, model: Ranker, rows: Encoded, labels: list[str], batch: int, *, limit: int | None = None,
                 show: bool = False, scores: Any = None, plan: TaskPlan | None = None,
                 backend: Backend | None = None) -> None:
        self.scores, self.rows, self.labels, self.batch = scores or Scores(model), rows, labels, batch
        self.limit, self.show, self.backend = limit, show, backend
        self.plan = plan or (model.plan if model is not None else TaskPlan.of((), len(labels)))

    def __call__(self, step: int) -> dict[str, float]:
        """BINARY_METRICS (or NUMBER_METRICS) for each task, on the samples that count for it."""
        return metrics_of(self.predictions(), self.labels, self.plan) if len(self.rows) else {}

    def predictions(self):
        """(labels_nK, probabilities_nK, users_n) batch by batch, in the order of the rows."""
        self.scores.set_train(False)
        total = -(-len(self.rows) // self.batch)
        if self.backend is not None and self.backend.ranks > 1:
            yield from self._in_turn(total if self.limit is None else min(total, self.limit))
            return
        batches = enumerate(in_order(self.rows, self.batch))
        for index, ((ids, numbers, labels), users, real) in (progress(batches, "evaluate", total) if self.show
                                                             else batches):
            if self.limit is not None and index >= self.limit:
                return
            scores = self.scores(Tensor(ids), Tensor(numbers)).asnumpy()
            yield labels[:real], scores[:real].astype(np.float64), users

    def _in_turn(self, total: int) -> Iterator[Prediction]:
        """As `predictions`: every process scores one batch in turn."""
        ranks, rank, merge = self.backend.ranks, self.backend.rank, RankScores(self.backend)
        for first in range(0, total, ranks):
            # All score as often, since tables that are spread over the processes are asked together.
            number = min(first + rank, total - 1)
            (ids, numbers, _), _, _ = filled_batch(self.rows, number * self.batch, self.batch)
            own = self.scores(Tensor(ids), Tensor(numbers)).asnumpy()
            whole = merge.gathered(own if first + rank < total else None, (ranks * self.batch, own.shape[1]),
                                rank * self.batch)
            for place in range(min(ranks, total - first)):
                (_, _, labels), users, real = filled_batch(self.rows, (first + place) * self.batch, self.batch)
                scores = whole[place * self.batch:place * self.batch + real]
                yield labels[:real], scores.astype(np.float64), users
