"""Metrics of a ranker that is sharded over processes: each group of them scores every so many-th batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from parallel.common.progress import progress
from recsys.data.batches import filled_batch
from recsys.data.encode import Encoded
from recsys.evaluation.score_merging import RankScores
from recsys.layers.tasks import TaskPlan
from recsys.passes.sharded import GroupScores, ShardedRanker
from recsys.passes.tasks import evaluation_rows
from recsys.training.validation import Prediction, metrics_of

if TYPE_CHECKING:
    from recsys.settings import Run


class ShardedEvaluation:
    """Exact metrics on a part of a log, the same on all processes; all of them call it.

    Args:
        ranker: this process's part.
        settings: of the run.
        rows: the part.
        labels: names of the tasks.
    """

    def __init__(self, ranker: ShardedRanker, settings: Run, rows: Encoded, labels: list[str]) -> None:
        self.ranker, self.rows, self.labels = ranker, rows, labels
        self.batch, self.plan = evaluation_rows(settings), TaskPlan.of(settings.model.tasks, len(labels))

    def __call__(self, step: int) -> dict[str, float]:
        """The metrics."""
        return metrics_of(self.predictions(), self.labels, self.plan)

    def predictions(self) -> Iterator[Prediction]:
        """(labels_nK, scores_nK, users_n) batch by batch, in the order of the rows."""
        member, merge = self.ranker.member, RankScores(GroupScores(self.ranker))
        total, kind = -(-len(self.rows) // self.batch), f"scores_{self.batch}"
        turns = range(0, total, member.groups)
        for first in progress(turns, "evaluate", len(turns)) if self.ranker.first else turns:
            number = min(first + member.group, total - 1)  # all score as often
            (ids, numbers, _), _, _ = filled_batch(self.rows, number * self.batch, self.batch)
            own = self.ranker.run(kind, (self.ranker.rows.rows(ids), numbers))
            given = own if member.leads and first + member.group < total else None
            whole = merge.gathered(given, (member.groups * self.batch, len(self.labels)), member.group * self.batch)
            for place in range(min(member.groups, total - first)):
                (_, _, labels), users, real = filled_batch(self.rows, (first + place) * self.batch, self.batch)
                scores = whole[place * self.batch:place * self.batch + real]
                yield labels[:real], scores.astype(np.float64), users
